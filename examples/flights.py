"""Trains examples/flights.toml and a linear model on the same real flights, and prints what each is worth.

pip install '.[mpich,examples]'
python examples/flights.py [FOLDER]
"""

import subprocess
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main(folder: Path) -> None:
    import dptrain

    job = tomllib.loads((HERE / "flights.toml").read_text())
    job["data"]["source"] = str(folder / "flights.csv")
    job["output"] = {"runs": str(folder / "runs")}
    linear = {**job, "name": "flights-linear", "model": {"layers": [{"type": "linear", "units": 1}]}}
    found = {name: dptrain.train(content) for name, content in (("linear", linear), ("network", job))}
    for name, result in found.items():
        test = result.metrics["test"]
        figures = f"MAE {test['mae']:.2f} minutes  R2 {test['r2']:.4f}  {result.samples_per_second:,.0f} samples/s"
        print(f"{name:8} {figures}  weights {result.weights_sha256}")
    if found["network"].metrics["test"]["mae"] > 0.9 * found["linear"].metrics["test"]["mae"]:
        sys.exit("flights.py: the network should be at least a tenth better than the linear baseline")


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    if not (folder / "flights.csv").exists():
        subprocess.run([sys.executable, HERE / "flights_data.py", folder / "flights.csv"], check=True)
    main(folder)
