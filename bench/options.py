"""What the command line asks of a benchmark."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from bench import rows
from bench.workload import CASES, MODELS, Workload

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Options:
    """Which cases, numbers of workers and contestants (none named: all), how often, and whether just to try it out."""

    cases: tuple[str, ...] = ()
    workers: tuple[int, ...] = (1, 2)
    only: tuple[str, ...] = ()
    repeats: int = 5
    quick: bool = False
    results: Path = RESULTS

    def case(self, name: str, data: Path) -> Workload:
        """A case on data in ``data``, written there once; few steps where it is just tried out."""
        case = CASES[name]
        return case.at(data=data_for(case.model, data), steps=max(10, case.steps // 8) if self.quick else case.steps)

    def wants(self, contestant: str) -> bool:
        """Whether a contestant takes part."""
        return not self.only or contestant in self.only


def data_for(model: str, folder: Path) -> str:
    """The folder of a model's rows below ``folder``; models of one shape share it."""
    network = MODELS[model]
    place = folder / "x".join(map(str, network.shape))
    if not place.exists():
        rows.write(network, place)
    return str(place)


@contextmanager
def data_folder() -> Iterator[Path]:
    """A folder for the rows, gone at the end."""
    with TemporaryDirectory(prefix="dptrain-bench-") as folder:
        yield Path(folder)
