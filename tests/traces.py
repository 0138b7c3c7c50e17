"""Reading a trace back."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

Event = dict[str, Any]


def read(path: Path) -> tuple[dict[str, Any], dict[int, list[Event]]]:
    """What a trace says of itself, and every thread's events in the order of the file, times in nanoseconds."""
    content = json.loads(path.read_text())
    threads: dict[int, list[Event]] = defaultdict(list)
    for event in content["traceEvents"]:
        if event["ph"] == "X":
            begin = round(event["ts"] * 1000)
            threads[event["tid"]].append(event | {"begin": begin, "end": begin + round(event["dur"] * 1000)})
    return content["otherData"], dict(threads)


def only(events: list[Event], category: str) -> list[Event]:
    return [event for event in events if event["cat"] == category]


def sums(events: list[Event]) -> dict[str, float]:
    """Seconds by phase."""
    found: dict[str, float] = defaultdict(float)
    for event in only(events, "phase"):
        found[event["name"]] += (event["end"] - event["begin"]) / 1e9
    return found


def check_nesting(events: list[Event]) -> None:
    """Every event lies within those that are open when it begins; phases leave no gap."""
    open_: list[Event] = []
    for event in events:
        while open_ and open_[-1]["end"] <= event["begin"] and open_[-1] is not event:
            open_.pop()
        assert event["begin"] <= event["end"]
        if open_:
            assert open_[-1]["begin"] <= event["begin"] <= event["end"] <= open_[-1]["end"]
        depth = {"step": 0, "phase": 1}.get(event["cat"], 2)
        assert all({"step": 0, "phase": 1}.get(outer["cat"], 2) < depth for outer in open_)
        open_.append(event)
    phases = only(events, "phase")
    assert [event["end"] for event in phases[:-1]] == [event["begin"] for event in phases[1:]]
