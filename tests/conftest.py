"""No test writes to the cache of the person who runs it."""

import os
from collections.abc import Iterator

# gRPC's handlers of a fork would otherwise run in every process that a test starts, and now and then abort it.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "DPTRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
