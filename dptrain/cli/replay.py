"""``dptrain replay``: a run done again in its order of arrival."""

import json
from pathlib import Path

from dptrain.cli.progress import pairs


def show(run: Path, as_json: bool) -> None:
    """Replay a run, and print to which weights. Raises ReplayError where they are others than the run's."""
    from dptrain.replay import replay

    result = replay(run)
    figures = {"steps": result["steps"], "weights": result["weights_sha256"]}
    if as_json:
        print(json.dumps(figures))
    else:
        print(f"{pairs(figures)}, as in {run}")
