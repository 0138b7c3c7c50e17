"""No test writes to the cache of the person who runs it."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "DPTRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
