"""Several servers, each with a segment, held to solo's hash."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from dptrain.exchange.parameter_server.client import Client
from dptrain.exchange.parameter_server.codec import Piece, decode_pull, decode_push
from dptrain.result import Result
from dptrain.training import run
from tests.exchange import jobs
from tests.exchange.parameter_server.running import Cluster

CASES = {
    # Eleven blocks, the best weights kept, an end by convergence.
    "mlp": jobs.job("mlp", 8, train={"steps": 40, "stop": {"patience": 2, "min_delta": 0.2}}),
    # Clipped, and in batch norm's buffers; a single block, so that two of three servers have an empty segment.
    "cnn": jobs.job("cnn", 6),
    # Clipped over several segments, partials in two bytes an element.
    "clipped": jobs.job("mlp", 6, optimizer={"clip_norm": 0.3}, arithmetic={"gradients": "bfloat16"}),
}


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    return {name: run(it, run_dir=tmp_path_factory.mktemp(name) / "run") for name, it in CASES.items()}


def same(result: Result, truth: Result) -> None:
    for key in ("weights_sha256", "metrics", "loss", "steps", "reason"):
        assert getattr(result, key) == getattr(truth, key), key
    assert result.same_bits


@pytest.mark.parametrize(
    ("name", "servers", "standby", "workers"),
    [("mlp", 2, False, 3), ("mlp", 3, True, 2), ("cnn", 3, False, 2), ("cnn", 1, True, 2), ("clipped", 2, False, 2),
     ("clipped", 3, False, 3)],
)  # fmt: skip
def test_the_hash_is_solos(
    name: str, servers: int, standby: bool, workers: int, truths: dict[str, Result], tmp_path: Path
) -> None:
    cluster = Cluster(CASES[name], tmp_path, servers, standby=standby)
    result = cluster.train(workers)
    same(result, truths[name])
    assert cluster.codes == [0] * workers
    assert len(cluster.others) == servers - 1 + standby
    for other in cluster.others:
        assert isinstance(other, Result), other
        same(other, truths[name])


def test_a_worker_that_comes_after_the_first_server_is_gone(truths: dict[str, Result], tmp_path: Path) -> None:
    cluster = Cluster(CASES["mlp"], tmp_path)

    def ready() -> None:
        cluster.addresses = [f"unix:{tmp_path / 'gone.sock'}", cluster.addresses[0]]
        cluster.worker()

    result = cluster.train(ready=ready)
    assert not cluster.others
    same(result, truths["mlp"])
    assert cluster.codes == [0]


def test_damaged_chunks_are_sent_again(
    truths: dict[str, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Partials on their way to two servers, and weights on their way back."""
    damaged: dict[str, int] = {}

    def damage(where: str, decode: Callable[[bytes], Piece], every: int) -> None:
        counts = itertools.count()

        def spoilt(message: bytes) -> Piece:
            if next(counts) % every:
                return decode(message)
            damaged[where] = damaged.get(where, 0) + 1
            return decode(message[:-1] + bytes([message[-1] ^ 1]))

        monkeypatch.setattr(f"dptrain.exchange.parameter_server.{where}", spoilt)

    monkeypatch.setattr(Client, "_lend", lambda self: None)
    damage("servicer.decode_push", decode_push, 5)
    damage("codec.decode_pull", decode_pull, 7)
    cluster = Cluster(CASES["mlp"], tmp_path, 2)
    result = cluster.train(2)
    same(result, truths["mlp"])
    assert cluster.codes == [0, 0]
    assert len(damaged) == 2
    assert min(damaged.values()) > 3
    # Two servers and two workers: nobody had to join again.
    assert len(result.per_worker) == 4
