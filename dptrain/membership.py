"""Who takes part, and whose shards are whose."""

from dataclasses import dataclass
from functools import cached_property

from dptrain.tree import Node, subtrees


@dataclass(frozen=True)
class Membership:
    """``size`` workers, of whom this one is ``rank``, share ``shards`` shards in contiguous ranges.

    Workers beyond the number of shards own none: they are warm spares. The lowest rank is the chief.
    """

    rank: int
    size: int
    shards: int

    def owned_by(self, rank: int) -> tuple[int, int]:
        """The shards lo <= s < hi of a worker; ranges differ in length by at most one."""
        owners = min(self.size, self.shards)
        if rank >= owners:
            return self.shards, self.shards
        return self.shards * rank // owners, self.shards * (rank + 1) // owners

    @property
    def mine(self) -> tuple[int, int]:
        """This worker's shards."""
        return self.owned_by(self.rank)

    @property
    def chief(self) -> bool:
        """Whether this worker writes the journal and the checkpoints."""
        return self.rank == 0

    @property
    def spares(self) -> int:
        """How many workers own no shard."""
        return max(0, self.size - self.shards)

    @cached_property
    def nodes(self) -> tuple[tuple[Node, ...], ...]:
        """Of every worker, the nodes of the canonical tree that it offers."""
        return tuple(tuple(subtrees(*self.owned_by(rank), self.shards)) for rank in range(self.size))

    def share(self, rank: int, total: int) -> tuple[int, int]:
        """A worker's part of ``total`` pieces of work that any worker can do, such as blocks of an evaluation."""
        return total * rank // self.size, total * (rank + 1) // self.size


class Led(Membership):
    """That of processes of which the chief has all shards."""

    def owned_by(self, rank: int) -> tuple[int, int]:
        """All, or none."""
        return (self.shards, self.shards) if rank else (0, self.shards)


class Coordinating(Membership):
    """That of one process which adds up what others compute: it has no shards, and no share in other work."""

    def owned_by(self, rank: int) -> tuple[int, int]:
        """None."""
        return self.shards, self.shards

    @property
    def spares(self) -> int:
        """Those that compute come and go."""
        return 0

    def share(self, rank: int, total: int) -> tuple[int, int]:
        """None."""
        return total, total
