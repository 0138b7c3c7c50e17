import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dptrain
from dptrain import rundir
from dptrain.errors import DataError, JobError, ModelError, StorageError
from dptrain.job.load import check, complete, load_job, to_toml
from tests.softmax import LAYERS, Batched, Softmax, job

MODEL = """
def build(scale=1.0):
    class Model:
        def parameters(self, rng):
            return {"W": rng.standard_normal((64, 10)) * scale}
        def forward(self, params, x, rng):
            return x @ params["W"], lambda dz: {"W": x.T @ dz}
    return Model()
"""


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    path = Path(dptrain.__file__).parent / "data/embedded/digits.npz"
    with np.load(path, allow_pickle=False) as members:
        return members["images"].reshape(-1, 64), members["labels"]


def test_a_job_may_be_a_mapping_a_path_or_a_job(tmp_path: Path) -> None:
    content = job(LAYERS)
    checked = complete(check(content, "x"))
    (tmp_path / "job.toml").write_text(to_toml(checked))
    ways: list[Any] = [content, checked, tmp_path / "job.toml", str(tmp_path / "job.toml")]
    results = [dptrain.train(it, run_dir=tmp_path / str(i)) for i, it in enumerate(ways)]
    assert len({result.weights_sha256 for result in results}) == 1
    assert len({result.job_sha256 for result in results}) == 1
    # The resolved job in the run is the same job again.
    again = dptrain.train(tmp_path / "0/job.toml", run_dir=tmp_path / "again")
    assert again.job_sha256 == results[0].job_sha256


def test_wrong_jobs_are_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="did you mean 'optimizer'"):
        dptrain.train({**job(LAYERS), "optimiser": {}}, run_dir=tmp_path / "x")
    with pytest.raises(JobError, match="found neither"):
        dptrain.train(job(), run_dir=tmp_path / "x")
    with pytest.raises(JobError, match="no model in the job beside the object"):
        dptrain.train(job(LAYERS), model=Softmax(), run_dir=tmp_path / "x")
    with pytest.raises(JobError, match="numbers, strings"):
        dptrain.train(job(LAYERS, train={"steps": np.int64(3)}), run_dir=tmp_path / "x")
    bad = replace(complete(check(job(LAYERS), "x")), seed=-1)
    with pytest.raises(JobError, match="seed"):
        dptrain.train(bad, run_dir=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_prediction_is_the_model(tmp_path: Path, digits: Any) -> None:
    dptrain.train(job(LAYERS), run_dir=tmp_path)
    trained = dptrain.load(tmp_path)
    x, y = digits
    z = trained.predict(x[:700])
    t = {name: view.astype(np.float64) for name, view in trained.tensors.items()}
    hidden = np.tanh(x[:700] / 16 @ t["layers.0.linear.W"] + t["layers.0.linear.b"])
    np.testing.assert_allclose(z, hidden @ t["layers.3.linear.W"] + t["layers.3.linear.b"], rtol=1e-4, atol=1e-4)
    assert (z.argmax(axis=1) == y[:700]).mean() > 0.8
    # Blocks of rows are a matter of memory; what a row gives is of its own.
    np.testing.assert_allclose(trained.predict(x[650:651]), z[650:651], rtol=1e-5, atol=1e-5)
    assert trained.predict(x[:0]).shape == (0, 10)
    assert trained.result["weights_sha256"].startswith("sha256:")
    assert trained.job.optimizer.lr == 0.5
    with pytest.raises(DataError, match="rows to encode"):
        trained.predict(x[:, :63])


def test_evaluation_gives_the_results_figures(tmp_path: Path) -> None:
    result = dptrain.train(job(LAYERS), run_dir=tmp_path)
    assert dptrain.load(tmp_path).evaluate() == result.metrics["test"]


def test_evaluation_of_new_rows_needs_no_training_data(tmp_path: Path) -> None:
    """The encoding was fitted on the training rows and is kept in the run."""
    rng = np.random.default_rng(1)

    def write(path: Path, rows: int) -> None:
        x = rng.standard_normal((rows, 3)) * 5 + 20
        y = 3 * x[:, 0] - x[:, 1] + 7 + rng.standard_normal(rows)
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["a", "b", "c", "y"], *np.column_stack([x, y]).tolist()])

    write(tmp_path / "train.csv", 200)
    write(tmp_path / "new.csv", 50)
    content = {
        "data": {
            "source": str(tmp_path / "train.csv"),
            "label": "y",
            "normalise": "standard",
            "label_normalise": "standard",
        },
        "model": {"layers": [{"type": "linear", "units": 1}]},
        "loss": {"metrics": ["r2", "mae"]},
        "train": {"batch_size": 20, "epochs": 30},
    }
    dptrain.train(content, run_dir=tmp_path / "run")
    (tmp_path / "train.csv").unlink()
    trained = dptrain.load(tmp_path / "run")
    figures = trained.evaluate(tmp_path / "new.csv")
    assert figures["r2"] > 0.95
    with (tmp_path / "new.csv").open() as file:
        table = np.array(list(csv.reader(file))[1:], dtype=np.float64)
    z = trained.predict(table[:, :3])
    assert figures["mae"] == pytest.approx(np.abs(z[:, 0] - table[:, 3]).mean(), rel=1e-3)


def test_an_object_as_the_model_trains_loads_and_predicts(tmp_path: Path, digits: Any) -> None:
    one = dptrain.train(job(), model=Softmax(), run_dir=tmp_path / "one")
    many = dptrain.train(job(), model=Batched(), run_dir=tmp_path / "many")
    assert one.weights_sha256 == many.weights_sha256
    assert one.job_sha256 != many.job_sha256
    trained = dptrain.load(tmp_path / "one", model=Softmax())
    x, _ = digits
    expected = (x[:40] / 16).astype(np.float32) @ trained.tensors["W"]
    np.testing.assert_allclose(trained.predict(x[:40]), expected, rtol=1e-5, atol=1e-5)
    assert trained.evaluate() == one.metrics["test"]
    with pytest.raises(ModelError, match="expected the object it was trained with, found none"):
        dptrain.load(tmp_path / "one")

    class Wide(Softmax):
        def parameters(self, rng: np.random.Generator) -> dict[str, Any]:
            return {**super().parameters(rng), "V": np.zeros(3)}

    with pytest.raises(ModelError, match="tensors"):
        dptrain.load(tmp_path / "one", model=Wide())


def test_the_sizes_of_an_object_are_part_of_the_job(tmp_path: Path) -> None:
    class Sized(Softmax):
        def __init__(self, extra: int) -> None:
            self.extra = extra

        def parameters(self, rng: np.random.Generator) -> dict[str, Any]:
            return {**super().parameters(rng), "V": np.zeros(self.extra)}

        def forward(self, params: Any, x: Any, rng: Any) -> Any:
            z, back = super().forward(params, x, rng)
            return z, lambda dz: {**back(dz), "V": np.zeros(self.extra)}

    small, large = (dptrain.train(job(), model=Sized(n), run_dir=tmp_path / str(n)) for n in (1, 2))
    assert small.job_sha256 != large.job_sha256


def test_a_python_file_as_the_model(tmp_path: Path, digits: Any) -> None:
    (tmp_path / "own.py").write_text(MODEL)
    content = job({"model": {"python": "own.py:build", "options": {"scale": 0.1}}})
    (tmp_path / "job.toml").write_text(to_toml(complete(check(content, "x"))))
    result = dptrain.train(tmp_path / "job.toml", run_dir=tmp_path / "run")
    assert result.weights_sha256 == dptrain.train(job(), model=Softmax(), run_dir=tmp_path / "object").weights_sha256
    assert (tmp_path / "run" / rundir.MODEL_SOURCE).read_text() == MODEL

    # The run keeps the source that it was made with, and needs the file no more.
    (tmp_path / "own.py").unlink()
    trained = dptrain.load(tmp_path / "run")
    assert trained.predict(digits[0][:3]).shape == (3, 10)
    assert trained.evaluate() == result.metrics["test"]

    # Another source is another job.
    (tmp_path / "own.py").write_text(MODEL.replace("* scale", "* scale + 0"))
    other = dptrain.train(tmp_path / "job.toml", run_dir=tmp_path / "other")
    assert other.job_sha256 != result.job_sha256
    assert other.weights_sha256 == result.weights_sha256


def test_a_job_with_a_python_file_can_be_given_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(MODEL)
    content = {**job({"model": {"python": "own.py:build"}}), "directory": str(tmp_path)}
    assert dptrain.train(content, run_dir=tmp_path / "run").state == "done"
    assert load_job(tmp_path / "run/job.toml").model.python == f"{tmp_path / 'own.py'}:build"


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="name a finished run directory"):
        dptrain.load(tmp_path)
    dptrain.train(job(LAYERS), run_dir=tmp_path / "run")
    weights = tmp_path / "run" / rundir.WEIGHTS
    content = weights.read_bytes()
    for broken in (b"", content[:-4], b"\xff" * 64):
        weights.write_bytes(broken)
        with pytest.raises(StorageError, match="the weights of a finished run"):
            dptrain.load(tmp_path / "run")
    weights.unlink()
    with pytest.raises(StorageError):
        dptrain.load(tmp_path / "run")


def test_without_a_name_a_run_goes_below_the_jobs_runs(tmp_path: Path) -> None:
    content = {**job(LAYERS), "directory": str(tmp_path)}
    result = dptrain.train(content)
    assert Path(result.run_dir).parent == tmp_path / "runs"
    content["train"]["steps"] = 25
    resumed = dptrain.train(content, resume=True)
    assert (resumed.run_dir, resumed.steps) == (result.run_dir, 25)
    assert json.loads((Path(result.run_dir) / rundir.RESULT).read_text())["attempt"] == 2
