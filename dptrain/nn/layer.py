"""What a layer and a model are, and what one pass over some shards hands them.

Every array of activations carries the shards first: ``x[j, i]`` is row i of the j-th shard of the pass. Products are
made per shard, as batched 3-D ``matmul`` over (k, b, n), whose bits are those of one 2-D product per shard.
Forward returns its backward: the closure is the saved state, there is no graph and no cached attribute.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dptrain.layout import Layout
from dptrain.phases import Phases

Array = npt.NDArray[Any]


class Workspace:
    """Memory that is planned once and used again every step, so that the steady state allocates nothing.

    The same key gives the same memory: its former content is lost. One workspace serves one pass at a time.
    """

    def __init__(self) -> None:
        self._memory: dict[Hashable, Array] = {}
        self._views: dict[Hashable, Array] = {}
        self._made: dict[Hashable, Array] = {}

    def array(self, key: Hashable, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """An uninitialised contiguous array; its memory is the key's, grown when a larger one is asked for."""
        exact = (key, shape, dtype)
        view = self._views.get(exact)
        if view is None:
            wanted = math.prod(shape) * np.dtype(dtype).itemsize
            memory = self._memory.get(key)
            if memory is None or memory.nbytes < wanted:
                memory = self._memory[key] = np.empty(-(-wanted // 64) * 8, dtype=np.float64)
                self._views = {kept: v for kept, v in self._views.items() if kept[0] != key}  # type: ignore[index]
            view = memory.view(np.uint8)[:wanted].view(dtype).reshape(shape)
            self._views[exact] = view
        return view

    def made(self, key: Hashable, make: Callable[[], Array]) -> Array:
        """What ``make`` gave when the key was first asked for: a constant, or memory of which parts never change."""
        array = self._made.get(key)
        if array is None:
            array = self._made[key] = make()
        return array

    def constant(self, value: float, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """A contiguous array that holds ``value`` everywhere, for reading."""
        return self.made((value, shape, dtype), lambda: np.full(shape, value, dtype))

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(memory.nbytes for held in (self._memory, self._made) for memory in held.values())


class Pass:
    """One forward (and backward) over k shards of one step.

    ``rows`` is (k, b) in the compute dtype, 1 for a real row and 0 for padding; ``counts`` the real rows of each
    shard; ``shards`` their numbers, which key the randomness together with ``seed`` and ``step``. ``phases`` is told
    which layer has the time.
    """

    def __init__(
        self,
        *,
        training: bool,
        seed: int,
        step: int,
        shards: Sequence[int],
        rows: Array,
        counts: Sequence[int],
        workspace: Workspace,
        phases: Phases | None = None,
    ) -> None:
        self.training = training
        self.seed = seed
        self.step = step
        self.shards = tuple(shards)
        self.rows = rows
        self.counts = tuple(counts)
        self.workspace = workspace
        self.phases = phases or Phases()


LayerBackward = Callable[[Array, Mapping[str, Array], bool], "Array | None"]
"""(dy, grads, need_dx) -> dx. Fills ``grads[name]``, shape (k, *shape), wholly for each of the layer's tensors."""


class Layer(Protocol):
    """One step of a chain. Bound to its input's shape when it is made; stateless from then on."""

    name: str
    output_shape: tuple[int, ...]
    parameters: Sequence[tuple[str, tuple[int, ...]]]
    buffers: Sequence[tuple[str, tuple[int, ...], float]]

    def initialise(self, tensors: Mapping[str, Array], rng: np.random.Generator) -> None:
        """Fill the layer's own tensors (names as in ``parameters`` and ``buffers``)."""

    def forward(self, tensors: Mapping[str, Array], x: Array, run: Pass) -> tuple[Array, LayerBackward]:
        """y of shape (k, b, *output_shape) and its backward. Never writes to x or the tensors."""


class Sink(Protocol):
    """Where a backward puts the gradients of its shards, tensor by tensor, in any order, each once."""

    def open(self, name: str) -> Array:
        """An array (k, *shape) to be filled wholly: per shard, the sum over its rows of the tensor's gradient.

        For a buffer: per shard, its real rows times the new statistic.
        """

    def close(self, name: str) -> None:
        """The tensor's gradients are written; the sink may add them now, while they are in the cache."""


ModelBackward = Callable[[Array, Sink], None]
"""(dz, sink): the gradients of all tensors, from the gradient of the model's output."""


class Model(Protocol):
    """What the worker trains: tensors in one flat vector, and a pass over k shards."""

    layout: Layout
    output_shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def initialise(self, vector: Array, seed: int) -> None:
        """Fill a flat vector of ``layout.size`` elements with the start: a function of seed and layout alone."""

    def forward(self, tensors: Mapping[str, Array], x: Array, run: Pass) -> tuple[Array, ModelBackward]:
        """z of shape (k, b, *output_shape) and its backward."""
