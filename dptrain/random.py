"""Randomness that is keyed, never consumed.

Every stream is Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with the
job's seed and the purpose as its key, and up to three numbers (step, shard, layer, ...) as the upper words of its
counter. Two streams with different words never overlap, and whoever knows the words has the stream: a worker that
takes over a shard draws what the dead one would have drawn.
"""

from enum import IntEnum

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1


class Purpose(IntEnum):
    """What a stream is for. Numbers are part of the bits: never renumber."""

    SPLIT = 1
    SHUFFLE = 2
    INITIALISE = 3
    DROPOUT = 4
    MODEL = 5
    SYNTHETIC = 6
    PROBE = 7


def bits(seed: int, purpose: Purpose, *words: int) -> np.random.Philox:
    """The raw stream of (seed, purpose, words); at most three words, each 0 <= word < 2**64."""
    if len(words) > 3:
        raise ValueError(f"a stream has at most three words, not {len(words)}")
    counter = [0, *(word & _MASK for word in words), *[0] * (3 - len(words))]
    return np.random.Philox(counter=counter, key=[seed & _MASK, int(purpose)])


def stream(seed: int, purpose: Purpose, *words: int) -> np.random.Generator:
    """numpy's generator over :func:`bits`, for floats and normals."""
    return np.random.Generator(bits(seed, purpose, *words))


class Permutation:
    """A keyed permutation of range(n) with random access, in O(1) memory.

    An alternating-moduli Feistel network over a x b >= n (Black and Rogaway, "Ciphers with arbitrary finite
    domains", CT-RSA 2002) with cycle walking back into range(n). As a * b < n + 2 * sqrt(n) + 1, hardly any
    position walks. Twelve rounds of a keyed 64-bit mixer (Steele et al., SplitMix, OOPSLA 2014) make it look random;
    it is not a cipher against an adversary.
    """

    ROUNDS = 12

    def __init__(self, n: int, seed: int, purpose: Purpose, *words: int) -> None:
        if n < 1:
            raise ValueError(f"a permutation needs at least one element, not {n}")
        self.n = n
        self._a = max(1, int(np.ceil(np.sqrt(n))))
        self._b = -(-n // self._a)
        self._keys = bits(seed, purpose, *words).random_raw(self.ROUNDS)

    def at(self, positions: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The elements at ``positions`` (integers in range(n), any shape), as int64 of the same shape."""
        asked = np.asarray(positions, dtype=np.int64)
        if asked.size and (int(asked.min()) < 0 or int(asked.max()) >= self.n):
            raise IndexError(f"positions reach outside range({self.n})")
        x = self._cycle(asked.astype(np.uint64).ravel())
        outside = np.flatnonzero(x >= self.n)
        while outside.size:
            x[outside] = self._cycle(x[outside])
            outside = outside[x[outside] >= self.n]
        return x.astype(np.int64).reshape(asked.shape)

    def _cycle(self, x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        a, b = np.uint64(self._a), np.uint64(self._b)
        left, right = x % a, x // a
        for i, key in enumerate(self._keys):
            modulus = a if i % 2 == 0 else b
            left, right = right, (left + _mix(right, key) % modulus) % modulus
        # After an even number of rounds left lives in range(a) and right in range(b) again.
        return left + a * right


def _mix(x: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    z = x * np.uint64(0x9E3779B97F4A7C15) + key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
