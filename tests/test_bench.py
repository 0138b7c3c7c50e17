import json
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import report, rows, spawn
from bench.comparisons import recovery, steps, survival
from bench.contestants import ours, running, survivable, wire
from bench.contestants.numpy_model import Network
from bench.interleave import Runs, interleaved
from bench.spawn import NotRun
from bench.workload import CASES, DATA_ROWS, MODELS, Model, Workload
from dptrain.launch import library
from dptrain.processes import process
from dptrain.supervise import PAUSE

SMALL = Model(
    "small",
    (4, 4, 2),
    (
        {"type": "conv2d", "channels": 3, "kernel": 3, "padding": "same"},
        {"type": "relu"},
        {"type": "max_pool2d", "kernel": 2},
        {"type": "flatten"},
        {"type": "linear", "units": 10},
    ),
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    folder = tmp_path_factory.mktemp("bench") / "rows"
    rows.write(MODELS["mlp"], folder)
    return CASES["mlp-32"].at(steps=30, data=str(folder), lr=0.05)


def test_a_workload_survives_being_an_argument():
    work = CASES["cnn-64"].at(workers=1, seed=3)
    assert Workload.parse(work.text()) == work
    assert DATA_ROWS % work.batch == 0


@pytest.mark.parametrize(
    ("name", "parameters"), [("mlp", 535_818), ("big", 5_824_522), ("wide", 20_037_642), ("cnn", 421_642)]
)
def test_the_models_have_the_parameters_of_their_layers(name: str, parameters: int):
    assert MODELS[name].parameters == parameters


@pytest.mark.parametrize("flat", [True, False])
def test_the_numpy_peer_differentiates(flat: bool):
    network = Network(SMALL, 0, flat=flat)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((6, *SMALL.shape), dtype=np.float32)
    y = rng.integers(0, 10, 6)
    network.differentiate(x, y)
    gradients = [g.copy() for g in network.gradients]
    for weights, gradient in zip(network.weights, gradients, strict=True):
        direction = gradient / np.linalg.norm(gradient)
        losses = []
        for way in (1, -1):
            weights += np.float32(way * 1e-2) * direction
            losses.append(network.differentiate(x, y))
            weights -= np.float32(way * 1e-2) * direction
        assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(np.linalg.norm(gradient), rel=0.05)


def test_dptrain_and_the_numpy_peer_do_equal_work(work: Workload):
    found = spawn.mpirun(2, "bench.contestants.ours", work.text(), "2", "auto", "auto")
    peer = spawn.mpirun(2, "bench.contestants.numpy_allreduce", work.text())
    naive = spawn.mpirun(2, "bench.contestants.numpy_allreduce", work.text(), "--naive")
    without = spawn.mpirun(2, "bench.contestants.numpy_allreduce", work.at(momentum=0.0).text())
    assert found["loss"] == pytest.approx(peer["loss"], rel=steps.LOSS_TOLERANCE)
    assert naive["loss"] == pytest.approx(peer["loss"], rel=1e-3)
    assert without["loss"] != pytest.approx(peer["loss"], rel=2 * steps.LOSS_TOLERANCE)
    assert min(each["samples_per_second"] for each in (found, peer, naive)) > 0


def test_dptrain_is_measured_after_the_warm_up(work: Workload):
    lines = [
        {"step": step, "seconds": 10.0 + step / 10 if step > 20 else 0.5 * step, "loss": step}
        for step in range(4, 51, 4)
    ]
    lines.append({"step": 50, "seconds": 15.0, "loss": 50})
    found = ours.measured(work, lines)
    assert found["samples_per_second"] == pytest.approx(30 * work.batch / (15.0 - 10.0))
    assert found["loss"] == pytest.approx((4 * sum(range(4, 49, 4)) + 2 * 50) / 50)


def test_a_contestant_with_another_loss_is_flagged():
    run = {steps.RATE: 1.0, "loss": 1.0}
    runs = {key: Runs([run]) for key in ("dptrain", "ddp", "torch")} | {"numpy": Runs([{**run, "loss": 0.8}])}
    figures = steps._figures(CASES["mlp-32"], runs)
    assert {key for key, some in figures.items() if not some["same_work"]} == {"numpy"}
    assert "other work" in steps._table(figures)


def test_products_by_mkl_are_a_row_only_where_all_runs_have_them():
    limit = {steps.RATE: 1.0, "products_samples_per_second": 2.0}
    both = {**limit, "mkl_products_samples_per_second": 3.0}
    without, with_mkl = (steps._figures(CASES["mlp-32"], {"limit": Runs([some])}) for some in (limit, both))
    assert "limit-products" in without
    assert "limit-products-mkl" not in without
    assert with_mkl["limit-products-mkl"][steps.RATE]["median"] == 3.0


def test_an_extra_that_is_not_installed_is_a_reason(work: Workload, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(steps, "find_spec", lambda name: True)
    monkeypatch.setattr(steps.metadata, "distributions", lambda **some: iter(()))
    with pytest.raises(NotRun, match=r"pip install '\.\[mkl\]'"):
        steps.CONTESTANTS["dptrain-mkl"].run(work)


def test_what_did_not_run_says_why():
    def fails(repeat: int) -> spawn.Found:
        raise NotRun("no such thing")

    runs = interleaved({"numpy": fails, "dptrain": lambda repeat: {steps.RATE: 2.0 + repeat, "loss": 1.0}}, 3, "a case")
    assert runs["numpy"].found == []
    assert statistics.median(runs["dptrain"].values(steps.RATE)) == 3.0
    table = steps._table(steps._figures(CASES["mlp-32"], runs))
    assert "not run: no such thing" in table
    assert table.count("\n") == 4


def test_a_missing_module_is_a_reason():
    with pytest.raises(NotRun, match=r"No module named bench\.nothing"):
        spawn.alone("bench.nothing")


def test_tables_and_figures_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    report.write(
        tmp_path, "some", "Title", {"repeats": 1}, {"cases": {"a": 1}}, report.table(["", "figure"], [["a", "1"]])
    )
    written = json.loads((tmp_path / "some.json").read_text())
    assert written["cases"] == {"a": 1}
    assert written["machine"]["cores"] >= 1
    assert "| a | 1 |" in (tmp_path / "some.md").read_text()
    assert "| a | 1 |" in capsys.readouterr().out


def test_cases_measured_before_stay_only_beside_their_like(tmp_path: Path) -> None:
    report.write(tmp_path, "some", "Title", {"repeats": 5}, {"cases": {"a": 1}}, "")
    assert report.kept(tmp_path, "some", {"repeats": 5}) == {"a": 1}
    assert report.kept(tmp_path, "some", {"repeats": 1}) == {}
    assert report.kept(tmp_path, "other", {"repeats": 5}) == {}
    path = tmp_path / "some.json"
    path.write_text(path.read_text().replace('"cores": ', '"cores": 1'))
    assert report.kept(tmp_path, "some", {"repeats": 5}) == {}


def _endless(work: Workload) -> Workload:
    return work.at(workers=recovery.WORKERS, rows=128, steps=recovery.ENDLESS)


@pytest.mark.parametrize(("key", "mpi"), [("ulfm", "Open MPI"), ("restart", "MPICH")])
def test_a_kill_is_recovered_from_and_timed(
    work: Workload, key: str, mpi: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BENCH_OPENMPI", raising=False)
    run = recovery.CONTESTANTS[key].run
    if library() != mpi:
        with pytest.raises(NotRun, match=f"needs {mpi}"):
            run(_endless(work), 1, 0)
        return
    found = run(_endless(work), 1, 0)
    (kill,) = found["kills"]
    assert kill["victim"] == 0
    if key == "ulfm":
        assert kill["lost"] == 0
        # A restart of the job could not be as quick.
        assert kill["seconds"] < PAUSE
    else:
        # The supervisor's pause is part of it.
        assert kill["seconds"] > PAUSE
        assert kill["lost"] < 10 * recovery.CHECKPOINT_SECONDS / kill["usual_step_seconds"]
    figures = recovery._figures(recovery.CONTESTANTS[key], Runs([found]))
    assert f"{kill['seconds']:.3f}" in recovery._table({key: figures})


def test_a_peer_that_is_missing_says_so(work: Workload, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("BENCH_TORCH", str(python))
    with pytest.raises(NotRun, match=r"No module named.*BENCH_TORCH can name another Python"):
        recovery.CONTESTANTS["torchrun"].run(_endless(work), 1, 0)


def test_nothing_of_a_command_is_left(tmp_path: Path) -> None:
    # What is asked to end is the shell; the other is in a session of its own.
    with running.Command(["sh", "-c", "setsid sleep 600 & echo begun; wait"], tmp_path) as command:
        assert running.until(lambda: "begun" in command.log.read_text(), 20)
        pids = running.descendants(command.process.pid)
        assert len(pids) == 1
    assert not command.running
    assert running.until(lambda: all(_over(pid) for pid in pids), 20)


def _over(pid: int) -> bool:
    found = process(pid)
    return found is None or found.state in "ZX"


def test_the_wire_moves_vectors_each_way() -> None:
    rates = spawn.alone("bench.contestants.wire", "3000", "2", "2")["bytes_per_second"]
    assert set(rates) == set(wire.WAYS)
    assert all(len(some) == 2 and min(some) > 0 for some in rates.values())


def test_what_survival_takes_is_switched(work: Workload) -> None:
    given = survivable.launch(work, survivable.Survival(checkpoint_seconds=1e-3))
    without = survivable.launch(work, survivable.Survival())
    assert given["checkpoints"] > 0
    assert without["checkpoints"] == 0
    off = survivable.Survival(tolerant=False)
    intolerant = spawn.alone(survival.MODULE, work.text(), off.text())
    assert [each["tolerant"] for each in (given, intolerant)] == [library() == "Open MPI", False]
    runs = {"without": Runs([without]), "with": Runs([given])}
    case = survival._figures(work, runs)
    assert case["times"]["median"] == pytest.approx(without[steps.RATE] / given[steps.RATE])
    assert "not run: no such thing" in report.table(
        [""] * 5, [survival._row("a case", survival._figures(work, {**runs, "with": Runs([], "no such thing")}), 5)]
    )
