"""dptrain with a parameter server on one machine and workers on others, as a person would start them by hand."""

import contextlib
import json
import sys
import tempfile
from pathlib import Path

import tomli_w

from bench import links, spawn
from bench.contestants import ours
from bench.spawn import Found
from bench.workload import Workload
from dptrain import journal
from dptrain.rundir import JOURNAL
from dptrain.supervision import RESULT
from dptrain.wire import certificates
from dptrain.wire.tokens import Role, TokenFile

PORT = 7011
TEST = 0.25
"""Share of the rows that accuracy is of."""

TOP_K = 0.05
"""Share of each tensor's elements that top_k sends at once."""


def train(work: Workload, gradients: str, rate: str) -> Found:
    """Train over links of that rate, one for each worker, with tokens and TLS. Raises NotRun."""
    with tempfile.TemporaryDirectory() as name, links.nodes(["", *[rate] * work.workers]) as (first, *others):
        folder = Path(name)
        _write(work, gradients, folder)
        host = links.address(0)
        certificates.init(folder, [host])
        token = TokenFile(folder / "tokens.json").create("bench", Role.worker)
        environ = {**spawn.environment(), "DPTRAIN_TOKEN": token, "DPTRAIN_TLS_CA": str(folder / "ca.crt")}
        program, there = [sys.executable, "-P", "-m", "dptrain"], f"{host}:{PORT}"
        keep = ["--tokens", f"{folder}/tokens.json", "--tls-cert", f"{folder}/server.crt"]
        keep += ["--tls-key", f"{folder}/server.key", "--run-dir", f"{folder}/run", "--progress", "none"]
        with contextlib.ExitStack() as running:
            line = [*first, *program, "param-server", f"{folder}/job.toml", "--listen", there, *keep]
            server = running.enter_context(spawn.started(line, environ))
            for other in others:
                running.enter_context(spawn.started([*other, *program, "worker", "--server", there], environ))
            spawn.finish(server)
        return _found(work, folder)


def alone(work: Workload, gradients: str) -> Found:
    """The same job in one process of this machine, which gives the same bits."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(work, gradients, folder)
        line = [sys.executable, "-P", "-m", "dptrain", "run", f"{folder}/job.toml", "--exchange", "solo"]
        line += ["--run-dir", f"{folder}/run", "--progress", "none"]
        with spawn.started(line, spawn.environment()) as process:
            spawn.finish(process)
        return _found(work, folder)


def _write(work: Workload, gradients: str, folder: Path) -> None:
    content = ours.content(work, work.workers, "ps")
    content["arithmetic"] |= {"gradients": gradients, "top_k": TOP_K}
    content["data"]["test"] = TEST
    content["output"]["journal_steps"] = 1
    (folder / "job.toml").write_text(tomli_w.dumps(content))


def _found(work: Workload, folder: Path) -> Found:
    result = json.loads((folder / "run" / RESULT).read_text())
    found: Found = ours.measured(work, journal.read_steps(folder / "run" / JOURNAL))
    return {**found, "weights_sha256": result["weights_sha256"], "accuracy": result["metrics"]["test"]["accuracy"]}
