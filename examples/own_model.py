"""A model of one's own, in plain numpy: softmax regression on the digits, trained by dptrain.

    python examples/own_model.py            # or: mpirun -n 3 python examples/own_model.py, for the same hash

The same file serves a job: model.python = "own_model.py:build".
"""

from collections.abc import Callable, Mapping

import numpy as np

import dptrain


class Softmax:
    """y = x W + b. ``forward`` returns y and its backward; gradients are sums over the rows."""

    def parameters(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"W": 0.01 * rng.standard_normal((64, 10)), "b": np.zeros(10)}

    def forward(
        self, params: Mapping[str, np.ndarray], x: np.ndarray, rng: np.random.Generator | None
    ) -> tuple[np.ndarray, Callable[[np.ndarray], dict[str, np.ndarray]]]:
        def backward(dy: np.ndarray) -> dict[str, np.ndarray]:
            return {"W": x.T @ dy, "b": dy.sum(axis=0)}

        return x @ params["W"] + params["b"], backward


def build() -> Softmax:
    """What a job file names."""
    return Softmax()


if __name__ == "__main__":
    job = {
        "name": "own",
        "data": {"source": "digits", "test": 0.2},
        "optimizer": {"lr": 0.5, "momentum": 0.9},
        "train": {"batch_size": 128, "epochs": 20},
    }
    result = dptrain.train(job, model=build())
    accuracy = result.metrics["test"]["accuracy"]
    print(f"test accuracy {accuracy:.4f}  weights {result.weights_sha256}")
    trained = dptrain.load(result.run_dir, model=build())
    assert trained.predict(np.zeros((1, 64))).shape == (1, 10)
    assert accuracy > 0.93
