"""Which batches are under way where a gradient may be of older weights, and who computes what of them.

Versions of the weights are numbered by the steps that led to them. With a bound s a batch makes a step at most s
versions after those that it was computed with (stale synchronous parallel, Ho et al. 2013, where a worker's clock is
the version that it computes with): whoever would run further ahead waits. Pure: nothing here waits or sends.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise


@dataclass(eq=False)
class Piece:
    """Shards lo to hi of a batch; ``version`` is that of the weights, once a ``member`` has it."""

    batch: int
    lo: int
    hi: int
    version: int | None = None
    member: int = 0
    done: bool = False


@dataclass(eq=False)
class Flight:
    """A batch under way."""

    batch: int
    pieces: list[Piece] = field(default_factory=list)

    @property
    def version(self) -> int | None:
        """The oldest of the weights that it is computed with; None while nobody computes it."""
        return min((piece.version for piece in self.pieces if piece.version is not None), default=None)

    @property
    def done(self) -> bool:
        """Whether all of it is computed."""
        return all(piece.done for piece in self.pieces)


class Flights:
    """Of batches ``pending``, then ``first`` to ``total``; ``bound`` None lets a gradient be of any age."""

    def __init__(self, shards: int, total: int, bound: int | None, first: int, pending: Sequence[int] = ()) -> None:
        self._shards, self._total, self._bound = shards, total, bound
        self._next, self._backlog = first, list(pending)
        self.open: list[Flight] = []
        self._done: list[Flight] = []
        """Those of the open that are computed, in order of their last arrival."""

    @property
    def pending(self) -> tuple[int, ...]:
        """The batches before the next new one that have not made a step."""
        return tuple(sorted([flight.batch for flight in self.open] + self._backlog))

    def wanted(self, workers: int) -> Piece | None:
        """What the next free worker of so many is to compute; None where it has to wait."""
        for flight in self.open:
            for piece in flight.pieces:
                if piece.version is None:
                    return piece
        if self._bound is not None and len(self.open) > self._bound:
            return None
        if self._backlog:
            batch = self._backlog.pop(0)
        elif self._next < self._total:
            batch, self._next = self._next, self._next + 1
        else:
            return None
        # Where fewer batches than workers may be under way, several share one.
        sharing = 1 if self._bound is None else -(-workers // (self._bound + 1))
        cuts = min(sharing, self._shards)
        borders = [self._shards * i // cuts for i in range(cuts + 1)]
        flight = Flight(batch, [Piece(batch, lo, hi) for lo, hi in pairwise(borders)])
        self.open.append(flight)
        return flight.pieces[0]

    def arrived(self, piece: Piece) -> None:
        """A piece is computed."""
        piece.done = True
        flight = next(flight for flight in self.open if flight.batch == piece.batch)
        if flight.done:
            self._done.append(flight)

    def lost(self, member: int) -> list[Piece]:
        """What a member that is gone had to do; others get it."""
        pieces = [p for flight in self.open for p in flight.pieces if p.member == member and not p.done]
        for piece in pieces:
            piece.version, piece.member = None, 0
        return pieces

    def ripe(self, version: int) -> Flight | None:
        """The batch that makes the next step, ``version`` steps having been made; it is under way no more.

        The first that came, unless the others would then become too old.
        """
        for flight in self._done:
            if self._bound is None or self._in_time(version + 1, [other for other in self.open if other is not flight]):
                self._done.remove(flight)
                self.open.remove(flight)
                return flight
        return None

    def _in_time(self, version: int, flights: Sequence[Flight]) -> bool:
        """Whether all of these can make a step in time, one after the other from ``version`` on."""
        assert self._bound is not None
        last = sorted(version if flight.version is None else flight.version for flight in flights)
        return all(version + i <= oldest + self._bound for i, oldest in enumerate(last))
