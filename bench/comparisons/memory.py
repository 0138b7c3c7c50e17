"""Memory of one machine as workers grow: PSS summed over all workers, while they train."""

from typing import Any

from bench import plot, report, spawn
from bench.options import Options, data_folder, data_for
from bench.spawn import NotRun
from bench.workload import Workload

WORKERS = (1, 2, 4, 8)
SHARDS = 8
BATCH = 128
MIB = 1 << 20
EXCHANGES = {"auto": "shared memory", "segments": "messages"}


def main(options: Options) -> None:
    """A model of six and one of twenty million parameters; leaves memory.json, .md and .png."""
    content: dict[str, Any] = {}
    tables, panels = [], {}
    with data_folder() as folder:
        for model in ("big",) if options.quick else ("big", "wide"):
            work = Workload(model, BATCH, 1, 4, data=data_for(model, folder))
            state = 4 * 2 * work.network.parameters
            found = {name: _measure(work, exchange) for exchange, name in EXCHANGES.items()}
            content[model] = {"parameters": work.network.parameters, "state_bytes": state, **found}
            tables.append(_table(work, state, found))
            panels[f"{work.network.title}: {work.network.parameters / 1e6:.1f} million"] = _lines(state, found)
    title = f"Memory of one machine in MiB (PSS of all workers together), {SHARDS} shards, batch {BATCH}"
    report.write(
        options.results, "memory", title, {"shards": SHARDS, "batch": BATCH}, {"models": content}, "\n".join(tables)
    )
    plot.lines(options.results / "memory.png", panels, "workers", "MiB")


def _measure(work: Workload, exchange: str) -> dict[str, Any]:
    """For every number of workers: what they hold together, in all and by kind."""
    found: dict[str, Any] = {}
    for workers in WORKERS:
        shared = work.at(workers=workers, rows=BATCH // workers)
        arguments = ("bench.contestants.footprint", shared.text(), str(SHARDS), exchange)
        if workers == 1:
            arguments = (*arguments[:-1], "auto")
        try:
            told = spawn.alone(*arguments) if workers == 1 else spawn.mpirun(workers, *arguments)
        except NotRun as error:
            found[str(workers)] = {"not_run": str(error)}
            continue
        some = told["workers"]
        if len(some) != workers:
            found[str(workers)] = {"not_run": f"found {len(some)} of {workers} processes"}
            continue
        found[str(workers)] = {key: sum(each[key] for each in some) for key in some[0]} | {"workers": some}
    return found


def _table(work: Workload, state: int, found: dict[str, Any]) -> str:
    heads = [f"{work.network.title}: weights + momentum {state / MIB:.0f} MiB", *(f"N = {n}" for n in WORKERS)]
    rows = []
    for name, by_workers in found.items():
        rows.append([f"{name}: all", *(_cell(by_workers[str(n)], "Pss") for n in WORKERS)])
        rows.append([f"{name}: of it shared", *(_cell(by_workers[str(n)], "Pss_Shmem") for n in WORKERS)])
        rows.append([f"{name}: of it private", *(_cell(by_workers[str(n)], "Pss_Anon") for n in WORKERS)])
    rows.append(["two copies of weights + momentum, once", *(f"{2 * state / MIB:.0f}" for n in WORKERS)])
    rows.append(["the same in every worker", *(f"{2 * state * n / MIB:.0f}" for n in WORKERS)])
    return report.table(heads, rows)


def _cell(figures: dict[str, Any], key: str) -> str:
    return f"{figures[key] / MIB:.0f}" if key in figures else f"not run: {figures['not_run'].replace('|', '/')}"


def _lines(state: int, found: dict[str, Any]) -> list[plot.Line]:
    lines = []
    for name, by_workers in found.items():
        for key, kind in (("Pss", "all"), ("Pss_Anon", "private")):
            ran = [n for n in WORKERS if key in by_workers[str(n)]]
            lines.append(plot.Line(f"{name}: {kind}", ran, [by_workers[str(n)][key] / MIB for n in ran]))
    lines.append(plot.Line("state in every worker", WORKERS, [2 * state * n / MIB for n in WORKERS], dashed=True))
    return lines
