import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import dptrain
from dptrain.errors import ModelError, StorageError
from dptrain.export import export
from tests.softmax import LAYERS, Softmax, job


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(dptrain.train(job(LAYERS), run_dir=tmp_path_factory.mktemp("runs") / "run").run_dir)


def test_onnx_predicts_as_we_do(run: Path, tmp_path: Path) -> None:
    from onnx import load
    from onnx.reference import ReferenceEvaluator

    x = np.random.default_rng(0).integers(0, 17, (20, 64)).astype(np.float32)
    path = export(run, "onnx", tmp_path / "model.onnx")
    model = load(path)
    y = ReferenceEvaluator(model).run(None, {"x": x})[0]
    np.testing.assert_allclose(y, dptrain.load(run).predict(x), rtol=1e-5, atol=1e-5)
    told = {item.key: item.value for item in model.metadata_props}
    assert told["weights_sha256"] == json.loads((run / "result.json").read_text())["weights_sha256"]


def test_safetensors_hold_the_weights_and_what_they_are_for(run: Path) -> None:
    path = export(run, "safetensors")
    assert path == run / "model.safetensors"
    trained = dptrain.load(run)
    with safe_open(path, "np") as file:
        assert {name: file.get_tensor(name).tobytes() for name in file.keys()} == {  # noqa: SIM118
            name: tensor.tobytes() for name, tensor in trained.tensors.items()
        }
        told = file.metadata()
    assert [layer["type"] for layer in json.loads(told["layers"])] == ["linear", "dropout", "tanh", "linear"]
    assert json.loads(told["encoding"]) == trained.encoding.plan()


def test_a_model_of_ones_own_has_no_graph(tmp_path: Path) -> None:
    dptrain.train(job(), model=Softmax(), run_dir=tmp_path / "run")
    with pytest.raises(ModelError, match=r"of one's own in Python.*use --format safetensors"):
        export(tmp_path / "run", "onnx")


def test_where_nothing_can_be_read_or_written(run: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="name a finished run"):
        export(tmp_path, "safetensors")
    with pytest.raises(StorageError, match="choose another --out"):
        export(run, "onnx", tmp_path / "none" / "model.onnx")


def test_a_model_of_tokens_predicts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 7, (200, 5))
    np.savez(tmp_path / "data.npz", x=tokens, y=(tokens.sum(axis=1) > 15).astype(np.int64))
    content = {
        "data": {"source": str(tmp_path / "data.npz")},
        "model": {
            "layers": [
                {"type": "embedding", "vocabulary": 7, "units": 3},
                {"type": "flatten"},
                {"type": "linear", "units": 2},
            ]
        },
        "train": {"steps": 5, "batch_size": 20, "shards": 2},
    }
    dptrain.train(content, run_dir=tmp_path / "run")
    from onnx import load
    from onnx.reference import ReferenceEvaluator

    ours = dptrain.load(tmp_path / "run").predict(tokens[:9])
    theirs = ReferenceEvaluator(load(export(tmp_path / "run", "onnx"))).run(None, {"x": tokens[:9]})[0]
    np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-5)
