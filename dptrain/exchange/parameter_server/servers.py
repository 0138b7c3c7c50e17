"""The servers of a run as a communicator: what one of them knows, all know before it counts.

All run the same loop and keep the same books; the first of the living, the chief, meets workers and writes to the run
directory. Each has a link to each other. When one dies the others meet, as ranks do, and go on.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dptrain.errors import DeadlineError, WorkerLost
from dptrain.exchange.communicator import Alone, Message, Posted
from dptrain.exchange.parameter_server.hub import Hub
from dptrain.exchange.parameter_server.link import Link
from dptrain.layout import Array
from dptrain.v1 import parameter_server_pb2 as pb

_SIGNS = 4
"""How many signs of life a server gives within the seconds after which it would be taken for dead."""

_LOOK = 0.05
"""Seconds of a meeting that one server is listened to, before the next is."""


class Chief(Alone):
    """The communicator of a server without others: it is alone, and its workers are the hub's."""

    number = 0
    era = 0
    """How many meetings there were."""
    disturbed = False
    """Whether another server is gone, leaves or meets."""

    def __init__(self, hub: Hub) -> None:
        super().__init__()
        self.hub = hub

    def notify(self, notice: pb.Notice, among: Sequence[int]) -> None:
        """Tell other servers, by their ranks, something beside what is said in turn."""


class Servers(Chief):
    """Server ``number`` among those that it has ``links`` to, by their numbers.

    Who gives no sign of life for ``silent_seconds`` counts as gone. A server that was itself stopped for so long does
    not go on where the others are gone: they go on without it.
    """

    survives = True

    def __init__(self, hub: Hub, number: int, links: Mapping[int, Link], silent_seconds: float) -> None:
        super().__init__(hub)
        self.number, self._links, self._silent_seconds = number, dict(links), silent_seconds
        self._among([number, *links])
        self._over = threading.Event()
        self._ticked = time.monotonic()
        self._stopped = self._ticked - silent_seconds
        for link in self._links.values():
            link.heard, link.watched = self._ticked, True
        self._signs = threading.Thread(target=self._give_signs, name="dptrain-signs", daemon=True)
        self._signs.start()

    @property
    def disturbed(self) -> bool:  # type: ignore[override]
        """See Chief."""
        return any(link.disturbed for link in self._others)

    def notify(self, notice: pb.Notice, among: Sequence[int]) -> None:
        """See Chief."""
        notice.era = self.era
        for rank in among:
            if rank != self.rank:
                self._links[self.members[rank]].notify(notice)

    def allgather(
        self, row: npt.NDArray[np.float64], phase: str, meanwhile: Callable[[], object] | None = None
    ) -> npt.NDArray[np.float64]:
        """See Communicator; bytes travel by threads, and there is nothing to look at."""
        every = self._exchanged(np.ascontiguousarray(row).data.cast("B"))
        return np.stack([np.frombuffer(said, row.dtype) for said in every])

    def allgather_json(self, content: Any, phase: str) -> list[Any]:
        """See Communicator."""
        return [json.loads(bytes(said)) for said in self._exchanged(json.dumps(content).encode())]

    def broadcast_json(self, content: Any, phase: str) -> Any:
        """See Communicator."""
        if self.rank:
            return json.loads(self._first.receive(self.deadline))
        said = json.dumps(content).encode()
        self._say(said)
        return json.loads(said)

    def broadcast(self, vector: Array, phase: str) -> None:
        """See Communicator."""
        if self.rank == 0:
            self._say(np.ascontiguousarray(vector).data.cast("B"))
        else:
            np.copyto(vector, np.frombuffer(self._first.receive(self.deadline), vector.dtype).reshape(vector.shape))

    def barrier(self, phase: str) -> None:
        """See Communicator."""
        self._exchanged(b"")

    def post(self, sends: Sequence[Message], receives: Sequence[Message], phase: str) -> Posted:
        """See Communicator; of one peer, messages arrive in the order in which they were sent, whatever their tags."""
        for message in sends:
            self._links[self.members[message.peer]].send(message.array.data.cast("B"))
        return _Arriving([(self._links[self.members[some.peer]], some.array) for some in receives], self.deadline)

    def machines(self) -> tuple[tuple[int, ...], ...]:
        """They share nothing."""
        return tuple((rank,) for rank in range(self.size))

    def meet(self, word: Callable[[], Any], *, settled: bool = False) -> list[Any] | None:
        """See Communicator: who comes here unsettled has lost another."""
        said: dict[int, Any] = {}
        told: tuple[int, ...] = ()
        since = started = time.monotonic()
        while True:
            view = tuple(member for member in self.members if member == self.number or not self._links[member].lost)
            if view == (self.number,) != self.members and self._was_away():
                raise WorkerLost(
                    f"parameter server {self.number}",
                    expected="to be heard of by the others",
                    found=f"that it was stopped for more than {self._silent_seconds:g} s",
                    cure="the others go on without it",
                )
            if view != told:
                told, since = view, time.monotonic()
                mine = {"members": view, "settled": settled, "era": self.era, "word": word()}
                text = json.dumps(mine).encode()
                said[self.number] = json.loads(text)
                for member in view:
                    if member != self.number:
                        self._links[member].send(text, meeting=True)
            waiting = [member for member in view if not _agrees(said.get(member), view)]
            if not waiting:
                break
            for member in waiting:
                self._listen(member, said)
            now = time.monotonic()
            if now - since > 2 * self._silent_seconds:
                self._dissent(view, said)
            if now - started > self.deadline:
                raise DeadlineError(
                    f"parameter server {self.number}",
                    expected=f"to meet servers {', '.join(map(str, waiting))} within {self.deadline:g} s",
                    found="no agreement on who lives",
                    cure="see what they are at, or raise exchange.deadline",
                )
        self._among(view)
        self.era = max(said[member].get("era", 0) for member in view) + 1
        if all(said[member].get("settled") for member in view):
            return None
        return [said[member]["word"] for member in view]

    def leave(self, code: int, *, knows: bool = False) -> None:
        """See Communicator; 0 where this server is done. Only the first call says something."""
        if self._over.is_set():
            return
        self._over.set()
        self._signs.join()
        for link in self._links.values():
            link.leave(0 if self.left else code)
        self.left = True

    def _listen(self, member: int, said: dict[int, Any]) -> None:
        try:
            found = self._links[member].meeting(_LOOK)
        except WorkerLost:
            return
        if isinstance(found, int):
            said[member] = {"word": {"leaving": found}}
        elif found is not None:
            said[member] = json.loads(found)

    def _dissent(self, view: Sequence[int], said: Mapping[int, Any]) -> None:
        """Two of the others don't hear each other, though both are heard here: the later one is left behind."""
        for member in view:
            missing = set(view) - set(said.get(member, {}).get("members", view))
            if missing:
                self._links[max(member, *missing)].lose()
                return

    def _among(self, members: Sequence[int]) -> None:
        self.members = tuple(sorted(members))
        self.rank, self.size = self.members.index(self.number), len(self.members)

    @property
    def _others(self) -> list[Link]:
        return [self._links[member] for member in self.members if member != self.number]

    @property
    def _first(self) -> Link:
        return self._links[self.members[0]]

    def _say(self, said: bytes | memoryview) -> None:
        for link in self._others:
            link.send(said)

    def _exchanged(self, said: bytes | memoryview) -> list[bytes | memoryview]:
        """What all say, in order of rank."""
        self._say(said)
        deadline = self.deadline
        return [said if member == self.number else self._links[member].receive(deadline) for member in self.members]

    def _give_signs(self) -> None:
        while not self._over.wait(self._silent_seconds / _SIGNS):
            if self._was_away():
                self._stopped = time.monotonic()
                # It could not hear.
                for link in self._others:
                    link.heard = self._stopped
            self._ticked = time.monotonic()
            for link in self._others:
                link.notify(pb.Notice(era=self.era))

    def _was_away(self) -> bool:
        """Whether this process was stopped for so long that others may have taken it for dead, and not long ago."""
        now = time.monotonic()
        return now - min(self._ticked, now) > self._silent_seconds or now - self._stopped < self._silent_seconds


class _Arriving:
    """Arrays that are filled from links, one after the other."""

    def __init__(self, awaited: Sequence[tuple[Link, Array]], seconds: float) -> None:
        self._awaited, self._seconds = awaited, seconds

    def wait(self) -> None:
        """See Posted."""
        for link, array in self._awaited:
            np.copyto(array, np.frombuffer(link.receive(self._seconds), array.dtype))

    def done(self) -> bool:
        """See Posted; waits for them."""
        self.wait()
        return True


def _agrees(said: Mapping[str, Any] | None, view: Sequence[int]) -> bool:
    """Whether a server has said that it meets these, or that it leaves."""
    return said is not None and ("members" not in said or said["members"] == list(view))
