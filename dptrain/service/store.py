"""What the service must not forget, in SQLite: jobs, what happened to them, and which requests were answered.

One thread writes; it puts the writes that wait together into one transaction, and each caller goes on only when that is
on the disk (WAL, synchronous = FULL). Reads take one of a few connections: hundreds of threads may want to.
"""

import contextlib
import json
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from dptrain.errors import NotFoundError, StorageError, UsageError
from dptrain.service.bell import Bell
from dptrain.service.filter import Listing, Query
from dptrain.service.model import ENDED, Job, Reason, Spec, State

T = TypeVar("T")

MIGRATIONS = (
    """
    CREATE TABLE jobs (
        id TEXT PRIMARY KEY, owner TEXT NOT NULL, name TEXT NOT NULL, state INTEGER NOT NULL, priority INTEGER NOT NULL,
        created REAL NOT NULL, updated REAL NOT NULL, finished REAL NOT NULL, labels TEXT NOT NULL, rest TEXT NOT NULL,
        request_id TEXT, request_sha256 TEXT, removed INTEGER NOT NULL DEFAULT 0, bytes INTEGER NOT NULL DEFAULT 0
    ) WITHOUT ROWID;
    CREATE UNIQUE INDEX jobs_request ON jobs (owner, request_id) WHERE request_id IS NOT NULL;
    CREATE INDEX jobs_created ON jobs (created, id) WHERE NOT removed;
    CREATE INDEX jobs_updated ON jobs (updated, id) WHERE NOT removed;
    CREATE INDEX jobs_priority ON jobs (priority, id) WHERE NOT removed;
    CREATE INDEX jobs_owner ON jobs (owner, created, id) WHERE NOT removed;
    CREATE INDEX jobs_state ON jobs (state, created, id) WHERE NOT removed;
    CREATE TABLE texts (
        job TEXT PRIMARY KEY, job_toml TEXT NOT NULL, run_toml TEXT NOT NULL, model_source TEXT NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE events (
        number INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL, time REAL NOT NULL, state INTEGER NOT NULL,
        reason INTEGER NOT NULL, message TEXT NOT NULL
    );
    CREATE INDEX events_job ON events (job, number);
    CREATE TABLE counts (value INTEGER NOT NULL);
    INSERT INTO counts VALUES (0);
    """,
    """
    DROP INDEX jobs_created;
    DROP INDEX jobs_updated;
    DROP INDEX jobs_priority;
    DROP INDEX jobs_owner;
    DROP INDEX jobs_state;
    CREATE INDEX jobs_created ON jobs (created, id, owner, state, name, labels, removed) WHERE NOT removed;
    CREATE INDEX jobs_updated ON jobs (updated, id, owner, state, name, labels, removed) WHERE NOT removed;
    CREATE INDEX jobs_priority ON jobs (priority, id, owner, state, name, labels, removed) WHERE NOT removed;
    CREATE INDEX jobs_owner ON jobs (owner, created, id, state, name, labels, removed, priority, updated)
        WHERE NOT removed;
    CREATE INDEX jobs_state ON jobs (state, created, id, owner, name, labels, removed, priority, updated)
        WHERE NOT removed;
    CREATE INDEX jobs_unended ON jobs (owner) WHERE NOT removed AND state NOT IN (8, 9, 10);
    CREATE INDEX jobs_removed ON jobs (id) WHERE removed;
    """,
)
"""Each brings a store of the version before it to its own; never changed, only added to.

The indexes of lists hold all that a list can be filtered by, so that a search through 100,000 jobs reads them alone.
"""

_BATCH = 256
"""Writes in one transaction at most."""

READERS = 8
"""Connections that read, at most: each holds files open."""

_COLUMNS = ("id", "owner", "state", "created", "updated", "finished")


class Event(NamedTuple):
    """A change of a job's state, reason or message."""

    number: int
    time: float
    state: State
    reason: Reason
    message: str


class _Write(NamedTuple):
    action: Callable[[sqlite3.Connection], Any]
    done: "Future[Any]"
    keys: list[str]


class Store:
    """The jobs of one server. ``bell`` is rung with a job's id whenever it has changed, and with "" for any."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bell = Bell()
        self._readers = threading.BoundedSemaphore(READERS)
        self._idle: list[sqlite3.Connection] = []
        self._closed = False
        self._lock = threading.Lock()
        self._writes: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        connection = self._open()
        with contextlib.closing(connection):
            _migrate(connection, path)
        self._writer = threading.Thread(target=self._write_all, name="store", daemon=True)
        self._writer.start()

    def close(self) -> None:
        """Let the writes that wait be done, then end."""
        self.bell.close()
        if self._writer.is_alive():
            self._writes.put(None)
            self._writer.join()
        with self._lock:
            self._closed, idle, self._idle = True, self._idle, []
        for connection in idle:
            connection.close()

    def create(self, job: Job, request_id: str, request_sha256: str) -> tuple[Job, bool]:
        """Keep a new job, or find the one that the same request has created: (job, whether it was there).

        When this returns the job is on the disk. Raises UsageError where the request was another.
        """

        def action(connection: sqlite3.Connection) -> tuple[str, bool]:
            if request_id:
                row = connection.execute(
                    "SELECT id, request_sha256 FROM jobs WHERE owner = ? AND request_id = ?", (job.owner, request_id)
                ).fetchone()
                if row is not None:
                    if row[1] != request_sha256:
                        raise UsageError(
                            "request_id",
                            expected="the same request as before, which created job " + row[0],
                            found="another one",
                            cure="use a new request_id for a new job",
                        )
                    return row[0], True
            _insert(connection, job, request_id, request_sha256)
            _tell(connection, job)
            return job.id, False

        found, existing = self._write(action, job.id)
        return (self.get(found), True) if existing else (job, False)

    def change(self, job_id: str, decide: Callable[[Job], Job]) -> Job:
        """Replace a job by what ``decide`` makes of it, and return that. Nobody else changes it in between.

        What ``decide`` raises is raised here and nothing is changed. Raises NotFoundError.
        """

        def action(connection: sqlite3.Connection) -> Job:
            before = _one(connection, job_id)
            after = decide(before)
            if after == before:
                return before
            told = (before.state, before.reason, before.message) != (after.state, after.reason, after.message)
            after = _stamped(after, time.time()) if told else after
            _update(connection, after)
            if told:
                _tell(connection, after)
            return after

        return self._write(action, job_id)

    def get(self, job_id: str) -> Job:
        """The job of that id. Raises NotFoundError."""
        with self._reading() as connection:
            return _one(connection, job_id)

    def find(self, reference: str, owner: str | None) -> Job:
        """The job of an id, of a unique prefix, or "@latest", among those of ``owner`` (None: all).

        Raises NotFoundError for one that is not there or is another's, UsageError where several are meant.
        """
        whose, values = ("", ()) if owner is None else (" AND owner = ?", (owner,))
        if reference == "@latest":
            text = f"SELECT id FROM jobs WHERE NOT removed{whose} ORDER BY created DESC, id DESC LIMIT 1"
            rows = self._rows(text, values)
        elif reference.isascii() and reference.isalnum():
            low = reference.lower()
            # By the id alone: the plus keeps SQLite from going through all of an owner's jobs.
            whose = whose.replace("owner", "+owner")
            text = f"SELECT id FROM jobs WHERE NOT removed AND id >= ? AND id < ?{whose} LIMIT 2"
            rows = self._rows(text, (low, low + "~", *values))
        else:
            rows = []
        if not rows:
            raise _missing(reference)
        if len(rows) > 1 and len(reference) < len(rows[0][0]):
            raise UsageError(
                f"job {reference!r}",
                expected="the beginning of one job's ID",
                found=f"that of several ({rows[0][0]}, {rows[1][0]})",
                cure="give more of its letters",
            )
        return self.get(rows[0][0])

    def page(self, query: Query) -> Listing:
        """Jobs as asked for, without the text of their job files."""
        rows = self._rows(*query.sql(f"{', '.join(_COLUMNS)}, rest, labels"))
        return query.listing([_job(row, None) for row in rows])

    def active(self) -> list[Job]:
        """All jobs that have not ended and are not paused, without the text of their job files."""
        states = sorted({*State} - ENDED - {State.PAUSED})
        marks = ", ".join("?" * len(states))
        rows = self._rows(
            f"SELECT {', '.join(_COLUMNS)}, rest, labels FROM jobs WHERE NOT removed AND state IN ({marks})", states
        )
        return [_job(row, None) for row in rows]

    def ended(self) -> list[tuple[str, float, int]]:
        """Of all jobs that have ended: id, when, and the bytes that they take."""
        marks = ", ".join("?" * len(ENDED))
        text = f"SELECT id, finished, bytes FROM jobs WHERE NOT removed AND state IN ({marks})"
        return [(job_id, at, size) for job_id, at, size in self._rows(text, sorted(ENDED))]

    def counts(self, owner: str | None) -> dict[State, int]:
        """How many jobs there are, by state."""
        whose, values = ("", ()) if owner is None else (" AND owner = ?", (owner,))
        rows = self._rows(f"SELECT state, count(*) FROM jobs WHERE NOT removed{whose} GROUP BY 1", values)
        return {State(state): count for state, count in rows}

    def totals(self) -> tuple[int, int]:
        """Jobs and events that were ever written."""
        (row,) = self._rows("SELECT (SELECT value FROM counts), (SELECT max(number) FROM events)")
        return int(row[0] or 0), int(row[1] or 0)

    def unended(self, owner: str) -> int:
        """How many jobs of an owner have not ended."""
        # The condition as the index has it, which holds those jobs alone.
        text = "SELECT count(*) FROM jobs INDEXED BY jobs_unended WHERE NOT removed AND state NOT IN (8, 9, 10)"
        return int(self._rows(f"{text} AND owner = ?", (owner,))[0][0])

    def events(self, job_id: str, after: int) -> list[Event]:
        """What happened to a job after the event of that number, in order."""
        rows = self._rows(
            "SELECT number, time, state, reason, message FROM events WHERE job = ? AND number > ? ORDER BY number",
            (job_id, after),
        )
        return [Event(number, at, State(state), Reason(reason), text) for number, at, state, reason, text in rows]

    def weigh(self, job_id: str, size: int) -> None:
        """Remember how many bytes a job's files take."""
        self._write(lambda c: c.execute("UPDATE jobs SET bytes = ? WHERE id = ?", (size, job_id)), job_id)

    def remove(self, job_id: str, decide: Callable[[Job], None]) -> None:
        """Mark a job as removed, unless ``decide`` raises. From then on nobody finds it; its files are still there."""

        def action(connection: sqlite3.Connection) -> None:
            decide(_one(connection, job_id))
            connection.execute("UPDATE jobs SET removed = 1 WHERE id = ?", (job_id,))

        self._write(action, job_id)

    def removed(self) -> list[str]:
        """Jobs that are marked as removed, and whose files may be there."""
        return [row[0] for row in self._rows("SELECT id FROM jobs WHERE removed")]

    def forget(self, job_id: str) -> None:
        """Remove all that is known of a job. Its files must be gone."""

        def action(connection: sqlite3.Connection) -> None:
            for table, column in (("jobs", "id"), ("texts", "job"), ("events", "job")):
                connection.execute(f"DELETE FROM {table} WHERE {column} = ?", (job_id,))

        self._write(action, job_id)

    def _write(self, action: Callable[[sqlite3.Connection], T], *keys: str) -> T:
        done: Future[T] = Future()
        self._writes.put(_Write(action, done, [*keys, ""]))
        return done.result()

    def _write_all(self) -> None:
        with contextlib.closing(self._open()) as connection:
            while (write := self._writes.get()) is not None:
                batch, last = [write], False
                with contextlib.suppress(queue.Empty):
                    while len(batch) < _BATCH:
                        more = self._writes.get_nowait()
                        if more is None:
                            last = True
                            break
                        batch.append(more)
                self._commit(connection, batch)
                if last:
                    break
        # Whoever comes too late is told so.
        while not self._writes.empty():
            late = self._writes.get()
            if late is not None:
                late.done.set_exception(_closed(self.path))

    def _commit(self, connection: sqlite3.Connection, batch: Sequence[_Write]) -> None:
        answers: list[tuple[_Write, Any, BaseException | None]] = []
        try:
            connection.execute("BEGIN IMMEDIATE")
            for write in batch:
                connection.execute("SAVEPOINT one")
                try:
                    answers.append((write, write.action(connection), None))
                except Exception as error:
                    connection.execute("ROLLBACK TO one")
                    answers.append((write, None, error))
                connection.execute("RELEASE one")
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            for write in batch:
                write.done.set_exception(_broken(self.path, error))
            return
        self.bell.ring(*{key for write, _, error in answers if error is None for key in write.keys})
        for write, value, failure in answers:
            if failure is None:
                write.done.set_result(value)
            else:
                write.done.set_exception(failure)

    def _rows(self, text: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._reading() as connection:
            return connection.execute(text, values).fetchall()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """One of the connections that only read, for as long as this is entered."""
        with self._readers:
            with self._lock:
                if self._closed:
                    raise _closed(self.path)
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                connection = self._open()
                connection.execute("PRAGMA query_only = 1")
            try:
                yield connection
            except sqlite3.Error as error:
                raise _broken(self.path, error) from error
            finally:
                with self._lock:
                    if not self._closed:
                        self._idle.append(connection)
                        connection = None
                if connection is not None:
                    connection.close()

    def _open(self) -> sqlite3.Connection:
        try:
            connection = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
        except sqlite3.Error as error:
            raise _broken(self.path, error) from None
        return connection


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Bring the schema to the newest version. Raises StorageError for a store of a newer dptrain, or a broken one."""
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            raise StorageError(
                str(path),
                expected=f"a store of version {len(MIGRATIONS)} or before",
                found=f"version {version}, of a newer dptrain",
                cure="start that dptrain, or use another --data",
            )
        for number, text in enumerate(MIGRATIONS[version:], version + 1):
            connection.executescript(f"BEGIN; {text}; PRAGMA user_version = {number}; COMMIT;")
        (state,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        found, wanted = _schema(connection), _fresh_schema()
    except sqlite3.Error as error:
        raise _broken(path, error) from None
    if state != "ok" or found != wanted:
        what = state if state != "ok" else f"others ({', '.join(sorted(found ^ wanted))[:200]})"
        raise StorageError(
            str(path),
            expected="a whole store with the tables of this version",
            found=what,
            cure="restore it from a backup, or move it away to begin with an empty one; runs stay where they are",
        )


def _schema(connection: sqlite3.Connection) -> set[str]:
    rows = connection.execute("SELECT name, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite_%'").fetchall()
    return {f"{name}: {' '.join(sql.split())}" for name, sql in rows}


def _fresh_schema() -> set[str]:
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        for text in MIGRATIONS:
            connection.executescript(text)
        return _schema(connection)


_OF_COLUMNS = frozenset({*_COLUMNS, "spec"})
_TEXTS = ("job_toml", "run_toml", "model_source")


def _rest(job: Job) -> str:
    """All of a job that has no column of its own."""
    rest = {f.name: getattr(job, f.name) for f in fields(Job) if f.name not in _OF_COLUMNS}
    spec = asdict(job.spec)
    return json.dumps({**rest, "spec": {key: value for key, value in spec.items() if key not in (*_TEXTS, "labels")}})


def _insert(connection: sqlite3.Connection, job: Job, request_id: str, request_sha256: str) -> None:
    spec = job.spec
    connection.execute(
        "INSERT INTO jobs (id, owner, name, state, priority, created, updated, finished, labels, rest, request_id,"
        " request_sha256) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *(job.id, job.owner, spec.name, job.state, spec.priority, job.created, job.updated, job.finished),
            *(json.dumps(dict(spec.labels)), _rest(job), request_id or None, request_sha256),
        ),
    )
    connection.execute("UPDATE counts SET value = value + 1")
    connection.execute(
        "INSERT INTO texts VALUES (?, ?, ?, ?)", (job.id, spec.job_toml, spec.run_toml, spec.model_source)
    )


def _update(connection: sqlite3.Connection, job: Job) -> None:
    spec = job.spec
    connection.execute(
        "UPDATE jobs SET name = ?, state = ?, priority = ?, updated = ?, finished = ?, labels = ?, rest = ?"
        " WHERE id = ?",
        (
            *(spec.name, job.state, spec.priority, job.updated, job.finished),
            *(json.dumps(dict(spec.labels)), _rest(job), job.id),
        ),
    )


def _tell(connection: sqlite3.Connection, job: Job) -> None:
    connection.execute(
        "INSERT INTO events (job, time, state, reason, message) VALUES (?, ?, ?, ?, ?)",
        (job.id, job.updated, job.state, job.reason, job.message),
    )


def _stamped(job: Job, now: float) -> Job:
    """The job with the times that go with the state it has just come to."""
    job = replace(job, updated=now)
    if job.state in ENDED:
        return replace(job, finished=now)
    return replace(job, finished=0.0)


def _one(connection: sqlite3.Connection, job_id: str) -> Job:
    columns = ", ".join(f"jobs.{name}" for name in _COLUMNS)
    row = connection.execute(
        f"SELECT {columns}, rest, labels, job_toml, run_toml, model_source FROM jobs JOIN texts ON texts.job = jobs.id"
        " WHERE jobs.id = ? AND NOT removed",
        (job_id,),
    ).fetchone()
    if row is None:
        raise _missing(job_id)
    return _job(row[: -len(_TEXTS)], row[-len(_TEXTS) :])


def _job(row: Sequence[Any], texts: Sequence[str] | None) -> Job:
    *columns, rest_text, labels = row
    rest: dict[str, Any] = json.loads(rest_text)
    spec: dict[str, Any] = rest.pop("spec")
    spec.update(workers=tuple(spec["workers"]), labels=json.loads(labels))
    spec.update(zip(_TEXTS, texts or [""] * len(_TEXTS), strict=True))
    known = dict(zip(_COLUMNS, columns, strict=True))
    known.update(state=State(known["state"]), spec=Spec(**spec), reason=Reason(rest.pop("reason")))
    return Job(**known, **rest)


def _missing(reference: str) -> NotFoundError:
    return NotFoundError(
        f"job {reference[:40]!r}",
        expected="one of your jobs: an ID, a unique prefix of one, or @latest",
        found="none",
        cure="`dptrain jobs -a` lists them",
    )


def _broken(path: Path, error: BaseException) -> StorageError:
    return StorageError(
        str(path), expected="to be read and written", found=str(error), cure="make room, or restore it from a backup"
    )


def _closed(path: Path) -> StorageError:
    return StorageError(str(path), expected="an open store", found="one that is closed", cure="try again")
