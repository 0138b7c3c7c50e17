"""What is measured: the same model, batch, optimizer and number of steps for everyone."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """A multilayer perceptron trained by ``workers`` workers on ``rows`` rows each a step."""

    name: str
    widths: tuple[int, ...]
    rows: int
    workers: int
    steps: int
    lr: float = 0.05
    momentum: float = 0.9

    @property
    def batch(self) -> int:
        return self.rows * self.workers

    @property
    def data_rows(self) -> int:
        """Rows of the data set, a whole number of batches."""
        return self.batch * (16_384 // self.batch)


CASES = {
    case.name: case
    for case in (
        Case("mlp-128", (784, 512, 256, 10), 128, 2, 600),
        Case("mlp-32", (784, 512, 256, 10), 32, 2, 1_000),
        Case("big-128", (784, 2048, 2048, 10), 128, 2, 80),
    )
}
