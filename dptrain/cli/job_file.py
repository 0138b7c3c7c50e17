"""``dptrain init``: the embedded job as a commented file with every key, its default and its meaning.

What the embedded job sets stands as a line of TOML; every other key is commented out with its default. The keys and
defaults come from ``dptrain.job.spec``; only the meanings are written here.
"""

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dptrain.cli.meanings import MEANINGS, NO_DEFAULT, SECTIONS
from dptrain.errors import StorageError, UsageError
from dptrain.job.spec import LAYERS, Job, Spec

HEAD = """\
# A job of dptrain. Lines that begin with "# key =" show a key and its default; remove the "# " to change it.
# Any key can also be given as `--set section.key=value` or as DPTRAIN_SECTION__KEY in the environment.
# Keys marked (launch) never change the result's bits.
"""


def write(path: Path, force: bool = False) -> None:
    """Write the commented job file. Raises UsageError where there is one already, unless ``force``."""
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text())
    except FileExistsError:
        raise UsageError(
            str(path), expected="no such file yet", found="one", cure="name another, or say --force to overwrite it"
        ) from None
    except OSError as error:
        raise StorageError(
            str(path), expected="a place to write to", found=error.strerror or str(error), cure="choose another path"
        ) from None


def text() -> str:
    """The content of the file."""
    from dptrain.job.load import EMBEDDED

    return HEAD + "\n" + "\n".join(_section(Job, (), EMBEDDED)) + "\n"


def _section(cls: type[Spec], path: tuple[str, ...], given: Mapping[str, Any]) -> Iterator[str]:
    inner: list[tuple[Field[Any], type[Spec]]] = []
    hints = get_type_hints(cls)
    for f in fields(cls):  # type: ignore[arg-type]
        if (*path, f.name) == ("directory",):
            continue
        if isinstance(hints[f.name], type) and is_dataclass(hints[f.name]):
            inner.append((f, hints[f.name]))
        else:
            yield from _key(f, hints[f.name], ".".join((*path, f.name)), given)
    for f, part in inner:
        name = ".".join((*path, f.name))
        yield ""
        yield from _wrapped(SECTIONS[name])
        yield f"[{name}]"
        yield from _section(part, (*path, f.name), given.get(f.name, {}))


def _key(f: "Field[Any]", hint: Any, name: str, given: Mapping[str, Any]) -> Iterator[str]:
    meaning = MEANINGS.get(name, "") + _allowed(hint)
    if name == "model.layers":
        yield from _wrapped(meaning)
        for kind in LAYERS.values():
            yield f"#   {layer_line(kind)}"
    else:
        yield from _wrapped(meaning)
    if f.name in given:
        yield f"{f.name} = {_toml(given[f.name])}"
    else:
        default = NO_DEFAULT.get(name, _default(f))
        yield f"#{'' if name in NO_DEFAULT else ' '}{f.name} = {_toml(default)}"


def layer_line(kind: type[Spec]) -> str:
    """A layer with all its keys at their defaults; a key without one stands at an example."""
    values = {f.name: _default(f) for f in fields(kind)}  # type: ignore[arg-type]
    examples = {name: 64 for name, value in values.items() if value is MISSING}
    return _toml({**values, **examples})


def _default(f: "Field[Any]") -> Any:
    return f.default_factory() if f.default_factory is not MISSING else f.default


def _allowed(hint: Any) -> str:
    many = get_origin(hint) is tuple
    values = [str(value) for member in (hint, *get_args(hint)) for value in _literals(member)]
    return f" {'Any' if many else 'One'} of {', '.join(values)}." if values else ""


def _literals(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) is Literal else ()


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 110, initial_indent="# ", subsequent_indent="# ")


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }" if value else "{}"
    if isinstance(value, (list, tuple)):
        if any(isinstance(item, Mapping) for item in value):
            return "[\n" + "".join(f"  {_toml(item)},\n" for item in value) + "]"
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return repr(value)
