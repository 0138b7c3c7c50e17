"""Uploads are whole, what they say they are, within their quota, and nothing leads out of their root."""

import gzip
import hashlib
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dptrain.errors import DataError, DptrainError, NotFoundError, QuotaError, UploadError, UsageError
from dptrain.service import below
from dptrain.service.datasets import Datasets, Header

QUOTA = 1 << 20


@pytest.fixture
def datasets(tmp_path: Path) -> Datasets:
    shared = tmp_path / "shared"
    (shared / "folder").mkdir(parents=True)
    (shared / "folder" / "x.npy").write_bytes(b"x")
    (tmp_path / "secret.csv").write_text("secret")
    (shared / "link.csv").symlink_to(tmp_path / "secret.csv")
    (shared / "out").symlink_to(tmp_path)
    os.mkfifo(shared / "pipe.csv")
    return Datasets(tmp_path / "root", shared, QUOTA)


def header(name: str, data: bytes, **given: object) -> Header:
    values = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "overwrite": False, **given}
    return Header(name, **values)  # type: ignore[arg-type]


def zipped(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def array(rows: int) -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(rows))
    return file.getvalue()


def test_what_is_taken_in_is_found_by_its_owner_alone(datasets: Datasets) -> None:
    datasets.take("ada", header("f/a.csv", b"1,2\n"), [b"1,", b"2\n"])
    assert datasets.resolve("ada", "f/a.csv", "k").read_bytes() == b"1,2\n"
    with pytest.raises(DataError):
        datasets.resolve("bob", "f/a.csv", "k")
    assert [found.path for found in datasets.list("ada")] == ["f/a.csv"]
    with pytest.raises(UploadError, match="free name"):
        datasets.take("ada", header("f/a.csv", b"3"), [b"3"])
    datasets.take("ada", header("f/a.csv", b"3", overwrite=True), [b"3"])
    assert datasets.used("ada") == 1
    datasets.remove("ada", "f/a.csv")
    assert not datasets.list("ada")
    with pytest.raises(NotFoundError):
        datasets.remove("ada", "f/a.csv")


@pytest.mark.parametrize("owner", ["..", ".", "", "a/b", "\0", ".incoming", "x" * 300, "日本"])
def test_no_owners_name_leads_out(datasets: Datasets, owner: str) -> None:
    datasets.take(owner, header("a.csv", b"1"), [b"1"])
    assert datasets.resolve(owner, "a.csv", "k").resolve().is_relative_to(datasets.root.resolve())
    assert datasets.folder(owner).parent == datasets.root
    assert datasets.folder(owner).name not in ("..", ".", ".incoming", "")


@pytest.mark.parametrize(
    "source",
    [
        "link.csv",
        "out",
        "out/secret.csv",
        "pipe.csv",
        "../secret.csv",
        "folder/../../secret.csv",
        "/etc/passwd",
        "",
        "/",
        *("folder//x.npy", "./folder", "folder\0", "f\udcff", "a" * 5000, "/" * 300),
    ],
)
def test_nothing_leads_out_of_the_roots(datasets: Datasets, source: str) -> None:
    with pytest.raises(DptrainError):
        datasets.resolve("ada", source, "data.source")


def test_shared_data_is_found_by_relative_and_whole_paths(datasets: Datasets) -> None:
    assert datasets.shared is not None
    wanted = datasets.shared / "folder"
    for source in ("folder", "folder/", str(wanted)):
        assert datasets.resolve("ada", source, "k") == wanted


@pytest.mark.parametrize(
    "name",
    ["", "a", "../a.csv", "/a.csv", ".a.csv", "a/b/c.csv", "a.exe", "a\n.csv", "é.csv", "a b.csv", "x" * 200 + ".csv"],
)
def test_names_that_are_not_taken(datasets: Datasets, name: str) -> None:
    with pytest.raises(UploadError):
        datasets.take("ada", header(name, b"1"), [b"1"])


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.npz", b"no archive"),
        ("a.npz", zipped(**{"../x.npy": array(1)})),
        ("a.npz", zipped(**{"x.txt": b"1"})),
        ("a.npz", zipped(**{"x.npy": b"no array"})),
        ("a.npz", zipped(**{"x.npy": array(200_000)})),
        ("a.npy", b"pickle"),
        ("a.parquet", b"1234567"),
        ("a.csv.gz", b"1,2"),
        ("a.csv.gz", gzip.compress(b"1,2\n" * 100, mtime=0)[:-9]),
        ("a.csv.gz", gzip.compress(bytes(QUOTA + 1), mtime=0)),
    ],
)
def test_what_is_not_what_its_name_says_or_unpacks_to_too_much(datasets: Datasets, name: str, data: bytes) -> None:
    with pytest.raises(UploadError):
        datasets.take("ada", header(name, data), [data])
    assert not datasets.list("ada")
    assert not list((datasets.root / ".incoming").iterdir())


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.npz", zipped(**{"x.npy": array(10)})),
        ("a.npy", array(3)),
        ("a.csv.gz", 2 * gzip.compress(b"1,2\n", mtime=0)),
    ],
)
def test_what_is_taken(datasets: Datasets, name: str, data: bytes) -> None:
    assert datasets.take("ada", header(name, data), [data]).size == len(data)


@pytest.mark.parametrize("sent", [b"", b"12", b"1234", b"124"])
def test_damage_on_the_way_is_seen(datasets: Datasets, sent: bytes) -> None:
    with pytest.raises(UploadError):
        datasets.take("ada", header("a.csv", b"123"), [sent])
    assert not datasets.list("ada")


def test_the_quota_is_each_owners(datasets: Datasets) -> None:
    data = bytes(QUOTA - 10)
    datasets.take("ada", header("a.csv", data), [data])
    with pytest.raises(QuotaError):
        datasets.take("ada", header("b.csv", b"x" * 11), [b"x" * 11])
    datasets.take("bob", header("b.csv", b"x" * 11), [b"x" * 11])


def test_files_are_opened_part_by_part(tmp_path: Path) -> None:
    (tmp_path / "r" / "a").mkdir(parents=True)
    (tmp_path / "r" / "a" / "f").write_text("x")
    (tmp_path / "r" / "l").symlink_to(tmp_path / "r" / "a")
    with below.opened(tmp_path / "r", "a/f", "w") as handle:
        assert os.read(handle, 9) == b"x"
    for path in ("l/f", "l", "a", "b"):
        with pytest.raises(NotFoundError), below.opened(tmp_path / "r", path, "w"):
            pass
    for path in ("", "/a/f", "../r/a/f", "a/../a/f", "a//f", "a\0"):
        with pytest.raises(UsageError), below.opened(tmp_path / "r", path, "w"):
            pass
    assert [found.path for found in below.walk(tmp_path / "r")] == ["a/f"]
