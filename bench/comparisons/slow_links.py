"""What gradients of fewer bytes save where links are slow: a server, two workers, each behind its own link."""

from typing import Any

from bench import report
from bench.comparisons.steps import RATE
from bench.contestants import linked
from bench.interleave import Runs, interleaved, spread
from bench.options import Options, data_folder

RATE_OF_LINKS = "100mbit"
STEPS = 25
"""Measured over the links; a step of float32 takes a third of a second there."""

STEPS_TO_JUDGE = 400
"""After which accuracy is compared, in one process, which gives the same bits."""

BYTES = {"auto": (4, 4), "bfloat16": (2, 4), "top_k": (8 * linked.TOP_K, 4)}
"""Of an element's way to the server and back; each of two workers has one shard."""

NAMES = {"auto": "float32", "top_k": f"top_k, {linked.TOP_K:g} of each tensor"}


def main(options: Options) -> None:
    """Leaves links.json and .md."""
    with data_folder() as folder:
        work = options.case("mlp-128", folder).at(workers=2, steps=5 if options.quick else STEPS)
        judged = work.at(steps=20 if options.quick else STEPS_TO_JUDGE)
        runs = interleaved(
            {
                kind: lambda repeat, kind=kind: {
                    **linked.train(work.at(seed=repeat), kind, RATE_OF_LINKS),
                    "alone": linked.alone(work.at(seed=repeat), kind)["weights_sha256"],
                    "accuracy": linked.alone(judged.at(seed=repeat), kind)["accuracy"],
                }
                for kind in BYTES
            },
            options.repeats,
            f"{work.title}, links of {RATE_OF_LINKS}",
        )
    content = {kind: _figures(kind, some, runs["auto"]) for kind, some in runs.items()}
    heads = [
        "gradients",
        "samples/s",
        "time saved",
        "its bytes promise",
        f"accuracy after {judged.total_steps} steps",
        "",
    ]
    title = (
        f"{work.title} and a server, each worker behind a link of {RATE_OF_LINKS} of its own (tokens, TLS): medians of "
        f"{options.repeats} interleaved repetitions, each another seed (lowest to highest)"
    )
    settings = {"repeats": options.repeats, "steps": work.steps, "rate": RATE_OF_LINKS}
    rows = [_row(kind, some, len(heads)) for kind, some in content.items()]
    report.write(options.results, "links", title, settings, {"gradients": content}, report.table(heads, rows))


def _figures(kind: str, some: Runs, exact: Runs) -> dict[str, Any]:
    if not some.found:
        return {"not_run": some.reason}
    saved = [1 - a / b for a, b in zip(exact.values(RATE), some.values(RATE), strict=False)]
    return {
        RATE: spread(some.values(RATE)),
        "saved": spread(saved),
        "promised": 1 - sum(BYTES[kind]) / sum(BYTES["auto"]),
        "accuracy": spread(some.values("accuracy")),
        "same_bits": all(run["weights_sha256"] == run["alone"] for run in some.found),
        "runs": some.found,
    }


def _row(kind: str, some: dict[str, Any], columns: int) -> list[str]:
    name = NAMES.get(kind, kind)
    if "not_run" in some:
        return report.not_run(name, some["not_run"], columns)
    cells = [
        f"{found['median']:{form}} ({found['lowest']:{form}} to {found['highest']:{form}})"
        for found, form in ((some[RATE], ",.0f"), (some["saved"], ".0%"), (some["accuracy"], ".4f"))
    ]
    bits = "the bits of one process" if some["same_bits"] else "**other bits than one process**"
    return [name, cells[0], cells[1], f"{some['promised']:.0%}", cells[2], bits]
