"""What a benchmark leaves in bench/results: the figures as JSON, a table in Markdown, a plot as PNG."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import machine


def write(
    folder: Path, name: str, title: str, settings: Mapping[str, Any], content: Mapping[str, Any], tables: str
) -> None:
    """NAME.json and NAME.md in ``folder``; the table is printed too."""
    folder.mkdir(parents=True, exist_ok=True)
    here = machine.describe()
    everything = {"machine": here, "settings": dict(settings), **content}
    (folder / f"{name}.json").write_text(json.dumps(everything, indent=1) + "\n")
    text = f"{title}\n\n{tables}\n{machine.line(here)}\n"
    (folder / f"{name}.md").write_text(text)
    print(text, flush=True)


def kept(folder: Path, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The cases of NAME.json, if they were measured on this machine and with these settings; else none."""
    try:
        before = json.loads((folder / f"{name}.json").read_text())
    except (OSError, ValueError):
        return {}
    same = before.get("machine") == machine.describe() and before.get("settings") == dict(settings)
    return dict(before["cases"]) if same else {}


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown: words to the left, figures to the right."""
    marks = ["---"] + ["---:"] * (len(heads) - 1)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (heads, marks, *rows))


def not_run(name: str, reason: str, columns: int) -> list[str]:
    """The row of a contestant that did not run."""
    return [name, f"not run: {reason.replace('|', '/')}", *[""] * (columns - 2)]
