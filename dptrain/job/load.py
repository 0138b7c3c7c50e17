"""A job from its file, the environment and the command line, checked once.

Precedence: ``--set`` over ``DPTRAIN_SECTION__KEY`` over the file over the defaults. Every error names the place
(file, variable or option), the key, the value found and what is allowed.
"""

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args, get_origin, get_type_hints

from dptrain.errors import JobError
from dptrain.job.spec import LAYERS, Job, Layer, needs_validation, plain, rebuild

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import ErrorDetails

DEFAULT_SHARDS = 8

NOT_KEYS = frozenset(
    {
        "CACHE",
        "HOSTFILE",
        "PROGRESS",
        "TRACEBACK",
        "SUPERVISED",
        "FT",
        "SERVER",
        "TOKEN",
        "TLS_CA",
        "NODES",
        "AFAR",
        "TICKET",
    }
)
"""DPTRAIN_ variables that steer the program, not the job."""

EMBEDDED: dict[str, Any] = {
    "name": "digits",
    "data": {"source": "digits", "validation": 0.1, "test": 0.2},
    "model": {
        "layers": [
            {"type": "linear", "units": 256},
            {"type": "relu"},
            {"type": "dropout", "rate": 0.2},
            {"type": "linear", "units": 128},
            {"type": "relu"},
            {"type": "linear", "units": 10},
        ]
    },
    "optimizer": {
        "type": "sgd",
        "lr": 0.2,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "schedule": {"type": "cosine"},
    },
    "train": {"batch_size": 128, "epochs": 30},
}
"""The job that plain ``dptrain`` runs where there is no dptrain.toml."""


def load_job(
    path: Path | None,
    sets: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    *,
    own_model: bool = False,
) -> Job:
    """The checked job of a TOML file, or the embedded default job where ``path`` is None.

    ``sets`` are ``key=value`` overrides with dotted keys and TOML values; ``environ`` is searched for DPTRAIN_
    variables. ``own_model`` as in :func:`complete`. Raises JobError for anything that is not as the job's schema says.
    """
    origin: dict[tuple[str | int, ...], str] = {}
    name = "the embedded job" if path is None else str(path)
    variables = list(_environment(environ or {}))
    if path is None and not sets and not variables:
        # It needs no checking (a test does that), and pydantic is slow to import.
        return complete(rebuild(Job, EMBEDDED), name)
    content: dict[str, Any] = json.loads(json.dumps(EMBEDDED)) if path is None else _read(path)
    for key, value in variables:
        _put(content, key, value, origin, f"environment variable {_variable(key)}")
    for assignment in sets:
        key, value = _assignment(assignment)
        _put(content, key, value, origin, f"--set {'.'.join(key)}")
    if path is not None:
        content.setdefault("name", path.stem)
    if "directory" in content:
        raise JobError(
            f"{name}: directory",
            expected="a key of the job",
            found="'directory'",
            cure="remove it: paths are meant from the job file",
        )
    content["directory"] = "." if path is None else str(path.parent)
    return complete(check(content, name, origin), name, own_model=own_model)


def check(content: Mapping[str, Any], name: str, origin: Mapping[tuple[str | int, ...], str] | None = None) -> Job:
    """The job of plain data, each key and value against the schema; ``name`` is where errors say it came from."""
    from pydantic import ValidationError

    content = dict(content)
    layers = content.get("model", {}).get("layers") if isinstance(content.get("model"), Mapping) else None
    for index, layer in enumerate(layers if isinstance(layers, list) else ()):
        _check_layer_type(layer, index, name)
    try:
        text = json.dumps(content, default=_refuse)
        return _schema().validate_json(text, strict=True)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=True)
        raise _told(details, layers, name, origin or {}) from None
    except TypeError as error:
        raise JobError(
            name,
            expected="numbers, strings, booleans, lists and tables",
            found=str(error),
            cure="write it as one",
        ) from None


@cache
def _schema() -> "TypeAdapter[Job]":
    """The checker of jobs. Making it takes longer than checking a thousand of them."""
    from pydantic import TypeAdapter

    return TypeAdapter(Job)


def complete(job: Job, name: str = "the job", *, own_model: bool = False) -> Job:
    """The job with what follows from other keys filled in, and keys that contradict each other refused.

    ``own_model``: the model is an object of the user's own, so [model] names none.
    """
    train = job.train
    if train.shards is None:
        job = replace(job, train=replace(train, shards=min(DEFAULT_SHARDS, train.batch_size)))
    elif train.shards > train.batch_size:
        raise JobError(
            f"{name}: train.shards",
            expected=f"at most train.batch_size = {train.batch_size}",
            found=str(train.shards),
            cure="a shard needs at least one row: lower train.shards or raise train.batch_size",
        )
    if (train.epochs > 0) == (train.steps > 0):
        both = train.epochs > 0
        raise JobError(
            f"{name}: train.epochs and train.steps",
            expected="exactly one of them above 0",
            found=f"epochs = {train.epochs}, steps = {train.steps}",
            cure="remove one" if both else "say how long to train, such as train.epochs = 10",
        )
    _refuse_models(job, name, own_model)
    if job.optimizer.nesterov and job.optimizer.momentum == 0:
        raise JobError(
            f"{name}: optimizer.nesterov",
            expected="a momentum above 0",
            found="optimizer.momentum = 0.0",
            cure="set optimizer.momentum, such as 0.9",
        )
    if job.arithmetic.gradients != "auto" and train.dtype != "float32":
        raise JobError(
            f"{name}: arithmetic.gradients",
            expected=f'"auto" with train.dtype = "{train.dtype}"',
            found=repr(job.arithmetic.gradients),
            cure="leave it out, or train in float32",
        )
    wants = "train.result = best" if train.result == "best" else "train.stop"
    if needs_validation(job) and job.data.validation == 0.0:
        raise JobError(
            f"{name}: {wants}",
            expected="a validation part to judge by",
            found="data.validation = 0",
            cure="set data.validation, such as 0.1",
        )
    return job


def _refuse_models(job: Job, name: str, own_model: bool) -> None:
    given = [key for key, value in (("layers", job.model.layers), ("python", job.model.python)) if value]
    if len(given) == (0 if own_model else 1):
        return
    if own_model:
        raise JobError(
            f"{name}: model.{given[0]}",
            expected="no model in the job beside the object that is given",
            found=" and ".join(given),
            cure="leave it out of the job, or the object out of the call",
        )
    raise JobError(
        f"{name}: model",
        expected='either model.layers or model.python = "file.py:function"',
        found="both" if given else "neither",
        cure="remove one" if given else "`dptrain init` writes a job file to start from",
    )


def to_toml(job: Job) -> str:
    """The job as a TOML file that loads to the same job."""
    import tomli_w

    return tomli_w.dumps(_without_none(plain(replace(job, directory="."))))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None and key != "directory"}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _read(path: Path) -> dict[str, Any]:
    where = f"job file {path}"
    try:
        return tomllib.loads(path.read_bytes().decode())
    except FileNotFoundError:
        raise JobError(
            where,
            expected="a TOML file",
            found="no such file",
            cure="`dptrain init` writes one to start from",
        ) from None
    except OSError as error:
        raise JobError(
            where, expected="a readable TOML file", found=error.strerror or str(error), cure="check the path"
        ) from None
    except UnicodeDecodeError as error:
        raise JobError(
            where, expected="UTF-8 text", found=f"byte {error.start} is not", cure="save it as UTF-8"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise JobError(where, expected="valid TOML", found=str(error), cure="mend that line") from None


def _environment(environ: Mapping[str, str]) -> Iterator[tuple[list[str], Any]]:
    known = {f.name for f in fields(Job)} - {"directory"}
    for variable in sorted(environ):
        if not variable.startswith("DPTRAIN_") or variable.removeprefix("DPTRAIN_") in NOT_KEYS:
            continue
        key = variable.removeprefix("DPTRAIN_").lower().split("__")
        if key[0] not in known:
            raise JobError(
                f"environment variable {variable}",
                expected="DPTRAIN_SECTION__KEY, such as DPTRAIN_OPTIMIZER__LR",
                found=f"no key {'.'.join(key)}",
                cure="unset it or correct its name",
            )
        yield key, _value(environ[variable])


def _variable(key: Sequence[str]) -> str:
    return "DPTRAIN_" + "__".join(key).upper()


def _assignment(text: str) -> tuple[list[str], Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise JobError(f"--set {text}", expected="key=value", found=repr(text), cure="such as --set optimizer.lr=0.05")
    return [part.strip() for part in key.split(".")], _value(value.strip())


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _put(
    content: dict[str, Any], key: list[str], value: Any, origin: dict[tuple[str | int, ...], str], place: str
) -> None:
    at = content
    for i, part in enumerate(key[:-1]):
        at = at.setdefault(part, {})
        if not isinstance(at, dict):
            raise JobError(
                place,
                expected=f"{'.'.join(key[: i + 1])} to be a table",
                found=repr(at),
                cure="correct the key",
            )
    if key in (["train", "epochs"], ["train", "steps"]):
        at.pop("steps" if key[-1] == "epochs" else "epochs", None)
    at[key[-1]] = value
    origin[tuple(key)] = place


def _check_layer_type(layer: Any, index: int, name: str) -> None:
    kind = layer.get("type") if isinstance(layer, Mapping) else None
    if not isinstance(kind, str) or kind not in LAYERS:
        near = difflib.get_close_matches(str(kind), LAYERS, n=1)
        raise JobError(
            f"{name}: model.layers[{index}].type",
            expected="one of " + ", ".join(sorted(LAYERS)),
            found=repr(kind) if isinstance(layer, Mapping) else f"{layer!r}, not a table",
            cure=f"did you mean {near[0]!r}?" if near else 'write a layer as { type = "linear", units = 10 }',
        )


def _refuse(value: Any) -> Any:
    raise TypeError(f"{value!r}")


class _Place(NamedTuple):
    """Where an error lies: ``keys`` of the job, ``spec`` the class of the innermost table."""

    keys: tuple[str | int, ...]
    spec: Any

    def __str__(self) -> str:
        text = ""
        for part in self.keys:
            text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
        return text


def _place(loc: Sequence[str | int]) -> _Place:
    """The keys of a location, without what the checker adds to it: classes and kinds of the members of a union."""
    keys: list[str | int] = []
    spec: Any = Job
    at: Any = Job
    for part in loc:
        if at == Layer:
            at = spec = next(cls for cls in LAYERS.values() if cls.__name__ == part)
            continue
        if not (is_dataclass(at) or get_origin(at) in (tuple, Mapping)):
            break
        keys.append(part)
        hints = get_type_hints(at) if is_dataclass(at) else {}
        at = hints.get(str(part)) if hints else get_args(at)[0] if get_origin(at) is tuple else None
        spec = at if is_dataclass(at) else spec
    return _Place(tuple(keys), spec)


def _told(
    details: "list[ErrorDetails]", layers: Any, name: str, origin: Mapping[tuple[str | int, ...], str]
) -> JobError:
    """The first error; a union reports one for every member, of which those of the meant place are put together."""

    def meant(detail: "ErrorDetails") -> bool:
        loc = detail["loc"]
        layer = loc[:2] == ("model", "layers") and len(loc) > 3
        return not layer or loc[3] == LAYERS[layers[loc[2]]["type"]].__name__

    told = [detail for detail in details if meant(detail)] or details
    # A misspelt key tells more than that the right one is missing.
    told = sorted(told, key=lambda detail: detail["type"] != "unexpected_keyword_argument")
    first = told[0]
    at = _place(first["loc"])
    source = next((where for keys, where in origin.items() if at.keys[: len(keys)] == keys), name)
    if first["type"] == "unexpected_keyword_argument":
        unknown = str(first["loc"][-1])
        allowed = [f.name for f in fields(at.spec) if f.name != "directory"]
        near = difflib.get_close_matches(unknown.lower(), allowed, n=1)
        return JobError(
            f"{source}: {at}",
            expected="one of the keys " + ", ".join(allowed),
            found=f"unknown key {unknown!r}",
            cure=f"did you mean {near[0]!r}?" if near else "remove it",
        )
    same = dict.fromkeys(_wanted(detail) for detail in told if _place(detail["loc"]) == at)
    missing, found = first["type"].startswith("missing"), repr(first["input"])
    return JobError(
        f"{source}: {at}",
        expected=" or ".join(same),
        found="nothing" if missing else found if len(found) < 100 else found[:97] + "...",
        cure="add it" if missing else "correct the value",
    )


def _wanted(detail: "ErrorDetails") -> str:
    kind = detail["type"]
    if kind.startswith("missing"):
        return "this key"
    if kind in ("dataclass_type", "dict_type", "mapping_type"):
        return "a table"
    if kind in ("tuple_type", "list_type"):
        return "a list"
    if kind == "bool_type":
        return "true or false"
    message = detail["msg"].removeprefix("Input should be ")
    return f"a number {message}" if kind.startswith(("greater", "less")) else message
