import re
import tomllib
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from dptrain.cli import job_file
from dptrain.cli.meanings import MEANINGS, NO_DEFAULT, SECTIONS
from dptrain.errors import StorageError, UsageError
from dptrain.job.load import check, load_job
from dptrain.job.spec import LAYERS, Job


def keys(cls: Any = Job, path: tuple[str, ...] = ()) -> tuple[set[str], set[str]]:
    """All keys and all sections of a job, from the dataclasses."""
    found, sections = set(), set()
    for f in fields(cls):
        hint, name = get_type_hints(cls)[f.name], ".".join((*path, f.name))
        if name == "directory":
            continue
        if isinstance(hint, type) and is_dataclass(hint):
            inner, deeper = keys(hint, (*path, f.name))
            found, sections = found | inner, sections | deeper | {name}
        else:
            found.add(name)
    return found, sections


def test_every_key_and_section_has_a_meaning_and_nothing_else_has() -> None:
    found, sections = keys()
    assert set(MEANINGS) == found
    assert set(SECTIONS) == sections
    assert set(NO_DEFAULT) <= found


def test_the_file_loads_to_the_embedded_job(tmp_path: Path) -> None:
    path = tmp_path / "dptrain.toml"
    job_file.write(path)
    written = load_job(path)
    embedded = load_job(None)
    assert {f.name: getattr(written, f.name) for f in fields(Job) if f.name != "directory"} == {
        f.name: getattr(embedded, f.name) for f in fields(Job) if f.name != "directory"
    }


def test_the_commented_values_are_the_defaults() -> None:
    text = job_file.text()
    uncommented = re.sub(r"(?m)^# (?=\w+ = )", "", text)
    assert check(tomllib.loads(uncommented), "uncommented") == check(tomllib.loads(text), "as written")
    content = tomllib.loads(re.sub(r"(?m)^# ?(?=\w+ = )", "", text))
    found, _ = keys()
    for name in found:
        at: Any = content
        for part in name.split("."):
            assert part in at, name
            at = at[part]


def test_every_kind_of_layer_is_shown_as_it_may_be_written() -> None:
    for kind, cls in LAYERS.items():
        line = job_file.layer_line(cls)
        assert line in job_file.text()
        layer = tomllib.loads(f"layer = {line}")["layer"]
        assert layer["type"] == kind
        assert set(layer) == {f.name for f in fields(cls)}  # type: ignore[arg-type]
        job = check({"model": {"layers": [layer]}, "train": {"epochs": 1}}, "one layer")
        assert type(job.model.layers[0]) is cls


def test_a_file_is_never_overwritten_unasked(tmp_path: Path) -> None:
    path = tmp_path / "dptrain.toml"
    path.write_text("mine")
    with pytest.raises(UsageError, match="--force"):
        job_file.write(path)
    assert path.read_text() == "mine"
    job_file.write(path, force=True)
    assert path.read_text() == job_file.text()


def test_a_place_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file or directory"):
        job_file.write(tmp_path / "nowhere" / "dptrain.toml")
