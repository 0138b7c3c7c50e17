import contextlib
import os
import shlex
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from dptrain.errors import NotFoundError, StorageError, UsageError
from dptrain.service.filter import Query
from dptrain.service.model import Job, Reason, Spec, State
from dptrain.service.store import MIGRATIONS, READERS, Store

SPEC = Spec(job_toml="a = 1", run_toml="a = 2", name="n\0\n'; DROP TABLE jobs; --", labels={"k": "v"}, workers=(2, 8))


def job(name: str, **given: object) -> Job:
    values = {"owner": "ada", "spec": SPEC, "created": 1.0, "updated": 1.0, **given}
    return Job(id=name, **values)  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "jobs.sqlite")
    yield made
    made.close()


def test_a_job_is_what_it_was(store: Store, tmp_path: Path) -> None:
    wanted = job("abc", reason=Reason.BACK_OFF, message="m", exit_code=3, workers=2)
    assert store.create(wanted, "", "") == (wanted, False)
    assert store.get("abc") == wanted
    store.close()
    again = Store(tmp_path / "jobs.sqlite")
    assert again.get("abc") == wanted
    again.close()


def test_a_request_is_one_job_however_often(store: Store) -> None:
    first, existing = store.create(job("a1"), "request", "digest")
    assert not existing
    assert store.create(job("b2"), "request", "digest") == (first, True)
    with pytest.raises(UsageError, match="another one"):
        store.create(job("c3"), "request", "another")
    # Another owner's requests are their own.
    assert store.create(job("d4", owner="bob"), "request", "another")[1] is False


def test_a_request_by_many_at_once_is_one_job(store: Store) -> None:
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda i=i: found.append(store.create(job(f"x{i}"), "request", "digest")[0].id))
        for i in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 16
    assert len(set(found)) == 1


def test_changes_are_events_and_rings(store: Store) -> None:
    store.create(job("a"), "", "")
    seen = store.bell.count("a")
    store.change("a", lambda job: job.to(State.STARTING, message="starts"))
    store.change("a", lambda job: replace(job, workers=3))
    assert store.bell.count("a") == seen + 2
    assert [(event.state, event.message) for event in store.events("a", 0)] == [
        (State.QUEUED, ""),
        (State.STARTING, "starts"),
    ]
    last = store.events("a", 0)[-1].number
    assert store.events("a", last) == []


def test_what_is_refused_changes_nothing(store: Store) -> None:
    store.create(job("a"), "", "")
    before = store.get("a")

    def refuse(job: Job) -> Job:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        store.change("a", refuse)
    assert store.get("a") == before
    with pytest.raises(NotFoundError):
        store.change("b", lambda job: job)


def test_prefixes_and_the_latest(store: Store) -> None:
    for name, created, owner in (("abc1", 1.0, "ada"), ("abd2", 3.0, "bob"), ("x", 2.0, "ada")):
        store.create(job(name, created=created, owner=owner), "", "")
    assert store.find("abc", None).id == "abc1"
    assert store.find("ABC1", None).id == "abc1"
    assert store.find("@latest", None).id == "abd2"
    assert store.find("@latest", "ada").id == "x"
    assert store.find("ab", "ada").id == "abc1"
    with pytest.raises(UsageError, match="several"):
        store.find("ab", None)
    for reference in ("abd2", "", "%", "_", "zz", "a' OR 1=1", "@first", "é"):
        with pytest.raises(NotFoundError):
            store.find(reference, "ada")


def pages(store: Store, size: int, order: str = "", text: str = "", owner: str | None = None) -> list[str]:
    found, token = [], ""
    while True:
        jobs, token = store.page(Query.of(owner, size, token, text, order))
        assert len(jobs) <= size
        found += [job.id for job in jobs]
        if not token:
            return found


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("order", ["created", "created desc", "priority asc", "priority desc", "updated", ""])
def test_pages_hold_everything_once_in_order(store: Store, size: int, order: str) -> None:
    for number in range(7):
        spec = replace(SPEC, priority=number % 3)
        store.create(job(f"j{number}", created=float(number // 2), updated=float(-number), spec=spec), "", "")
    found = pages(store, size, order)
    assert sorted(found) == [f"j{number}" for number in range(7)]
    assert found == pages(store, 100, order)


def test_filters(store: Store) -> None:
    store.create(job("a", state=State.RUNNING), "", "")
    store.create(job("b", state=State.FAILED, spec=replace(SPEC, name="Other thing", labels={"team": "x y"})), "", "")
    store.create(job("c", owner="bob"), "", "")
    assert pages(store, 9, text="state=running,QUEUED") == ["c", "a"]
    assert pages(store, 9, text="active=true owner=ada") == ["a"]
    assert pages(store, 9, text="active=false") == ["b"]
    assert pages(store, 9, text='name="other T"') == ["b"]
    assert pages(store, 9, text='label.team="x y"') == ["b"]
    assert pages(store, 9, text="label.k=v owner=bob") == ["c"]
    assert pages(store, 9, text="id=B") == ["b"]
    assert pages(store, 9, owner="bob") == ["c"]


@pytest.mark.parametrize(
    "given",
    [
        {"filter_text": "state=NONE"},
        {"filter_text": "what"},
        {"filter_text": "active=maybe"},
        {"filter_text": 'name="'},
        {"filter_text": "x" * 5000},
        {"order_by": "name"},
        {"order_by": "created sideways"},
        {"order_by": "created; DROP TABLE jobs"},
        {"token": "nonsense"},
        {"token": "W10="},
        {"token": "é"},
        {"size": -1},
    ],
)
def test_lists_that_are_not_understood(given: dict[str, object]) -> None:
    values = {"owner": None, "size": 1, "token": "", "filter_text": "", "order_by": "", **given}
    with pytest.raises(UsageError):
        Query.of(**values)  # type: ignore[arg-type]


def test_a_token_is_for_its_list_alone(store: Store) -> None:
    for name in "abc":
        store.create(job(name), "", "")
    _, token = store.page(Query.of(None, 1, "", "", ""))
    with pytest.raises(UsageError, match="another list"):
        Query.of(None, 1, token, "state=QUEUED", "")


def test_removed_jobs_are_not_there(store: Store) -> None:
    store.create(job("a"), "request", "digest")
    store.remove("a", lambda job: None)
    with pytest.raises(NotFoundError):
        store.get("a")
    assert pages(store, 9) == []
    assert store.removed() == ["a"]
    store.forget("a")
    assert store.removed() == []


def test_a_search_reads_indexes_alone(store: Store) -> None:
    filters = ("", "name=x", "label.k=v", "state=SUCCEEDED", "state=QUEUED,FAILED", "active=true", "active=false")
    for owner, filter_text, order_by in product((None, "ada"), filters, ("created", "updated desc", "priority asc")):
        text, values = Query.of(owner, 50, "", filter_text, order_by).sql("id, rest")
        plan = [row[3] for row in store._rows(f"EXPLAIN QUERY PLAN {text}", values)]
        whole, *searched = [line for line in plan if " jobs " in line]
        assert "PRIMARY KEY" in whole
        assert searched
        assert all("COVERING" in line for line in searched), plan


def test_many_readers_share_a_few_files(store: Store) -> None:
    store.create(job("a"), "", "")
    started = threading.Barrier(100)

    def read(_: int) -> str:
        started.wait()
        return store.get("a").id

    with ThreadPoolExecutor(100) as pool:
        assert list(pool.map(read, range(100))) == ["a"] * 100
    files = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert files.count(str(store.path)) <= READERS + 1
    store.close()
    with pytest.raises(StorageError, match="closed"):
        store.get("a")


def test_labels_are_found_as_they_are(store: Store) -> None:
    labels = ('a"b', "ü", "a\\", "a b", "\U0001f600")
    for i, label in enumerate(labels):
        for name, given in (("a", {label: label}), ("b", {f'x"{label}': label}), ("c", {"k": f'"{label}": "{label}"'})):
            store.create(job(f"{name}{i}", spec=replace(SPEC, labels=given)), "", "")
    for i, label in enumerate(labels):
        word = shlex.quote(f"label.{label}={label}")
        assert [found.id for found in store.page(Query.of(None, 9, "", word, "")).jobs] == [f"a{i}"]


def test_a_store_of_the_first_version_is_brought_to_this_one(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(f"{MIGRATIONS[0]}; PRAGMA user_version = 1;")
        connection.execute("INSERT INTO jobs VALUES ('a', 'ada', 'n', 1, 0, 1, 1, 0, '{}', '{}', NULL, NULL, 0, 0)")
        connection.commit()
    store = Store(path)
    assert store.unended("ada") == 1
    store.close()


def test_a_newer_store_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    Store(path).close()
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    connection.close()
    with pytest.raises(StorageError, match="newer dptrain"):
        Store(path)


def test_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    Store(path).close()
    connection = sqlite3.connect(path)
    connection.execute("DROP INDEX jobs_state")
    connection.close()
    with pytest.raises(StorageError, match="jobs_state"):
        Store(path)


def test_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(StorageError, match="not a database"):
        Store(path)


def test_it_syncs_before_it_answers(store: Store) -> None:
    connection = store._open()
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()
