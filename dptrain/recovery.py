"""What the living do after a death: meet, take the newest state that any of them has, and share the shards anew.

A step counts as soon as one worker knows that all agreed on it: then every worker had written its next state, and
whoever doesn't know it yet only has to be told. So nobody goes back, and at most the step under way is done again.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dptrain import afar, rundir
from dptrain.arrivals import arrival
from dptrain.chronicle import Chronicle
from dptrain.corruption import Auditor
from dptrain.errors import PeerFailed, PoisonError, WorkerLost
from dptrain.exchange.communicator import culprit
from dptrain.exchange.verdict import Verdict
from dptrain.meeting import Meeting, for_all
from dptrain.phases import NAMES, OWN, Phase
from dptrain.state import State
from dptrain.worker import Worker


class Recovery:
    """One worker's part in surviving. ``hosts`` are those of the workers at the start, by their rank at the launch.

    ``lead`` is called on a worker that becomes the chief. ``log`` holds what happened, the same on all workers.
    """

    def __init__(
        self,
        worker: Worker,
        meeting: Meeting,
        chronicle: Chronicle,
        hosts: Mapping[int, str],
        lead: Callable[[], None],
        auditor: Auditor,
    ) -> None:
        self.worker, self.meeting, self.chronicle = worker, meeting, chronicle
        self.communicator = meeting.communicator
        self.hosts, self.lead, self.auditor = hosts, lead, auditor
        self.log: list[dict[str, Any]] = []
        self.behind = False
        """Whether all have to go back, as what belongs to their state is gone."""
        self._suspects: dict[int, list[int]] = {}
        self._suspected_at = -1

    def meet(self, *, settled: bool = False) -> bool:
        """Meet the others; False where all have settled what they had to do, so that the run is over.

        Else it goes on from the worker's state, in the exchange of those that are left. Raises PeerFailed where one
        of them leaves with an error, PoisonError on all, WorkerLost on all where what is left isn't enough.
        """
        worker, communicator = self.worker, self.communicator
        began = time.perf_counter()
        worker.phases.begin(Phase.RECOVERY)
        before = communicator.members
        words = communicator.meet(self._word, settled=settled)
        if words is None:
            return False
        self._refuse(words)
        gone = [member for member in before if member not in communicator.members]
        died = [self._obituary(member, words) for member in gone]
        newest = max(words, key=lambda word: (word["step"], word["evaluated"]))
        self.auditor.heard([word["audit"] for word in words])
        self._look_for_poison(newest["step"] + 1, died, before)
        worker.renew(self.meeting.renew())
        afar.renew(len(self.log) + 1, communicator.members[0])
        if communicator.rank == 0:
            worker.try_to_watch(rundir.take_over)
        leads = communicator.rank == 0 and self.chronicle.journal is None
        if leads:
            worker.try_to_watch(self.lead)
        self.behind = any(word["behind"] for word in words)
        if self.auditor.finding is None and not self.behind:
            self._catch_up(newest)
        self.chronicle.renew(self.meeting.membership, [before.index(member) for member in communicator.members])
        entry = {
            "step": worker.state.step,
            "died": died,
            "workers": communicator.size,
            "chief": communicator.members[0],
            "seconds": round(time.perf_counter() - began, 6),
        }
        self.log.append(entry)
        worker.try_to_watch(lambda: self.chronicle.recovered(entry))
        worker.phases.begin(Phase.OTHER)
        return True

    def _word(self) -> dict[str, Any]:
        """What the others have to know of this worker."""
        worker = self.worker
        state, verdict = worker.state, worker.verdict
        return {
            "step": state.step,
            "updates": state.updates,
            "side": state.side,
            "evaluated": state.judgement.evaluated,
            "figures": worker.figures,
            "verdict": None if verdict is None else verdict._asdict() | {"phases": verdict.phases.tolist()},
            "seen": self.meeting.seen(),
            "audit": self.auditor.word(),
            "behind": self.behind,
        }

    def _refuse(self, words: Sequence[Mapping[str, Any]]) -> None:
        communicator = self.communicator
        for rank, word in enumerate(words):
            if "leaving" in word:
                communicator.agreed = communicator.left = True
                communicator.blamed = culprit(words, communicator.members)
                who, code = communicator.blamed or (communicator.members[rank], word["leaving"])
                raise PeerFailed(who, self.worker.state.step, "recovering", code)
        if not self.meeting.survivable:
            raise for_all(
                WorkerLost(
                    f'exchange.type = "{self.meeting.kind}"',
                    expected="every worker to live",
                    found="a death",
                    cure='go on with --resume; "node" and "segments" survive that',
                )
            )

    def _obituary(self, member: int, words: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Who died, and where it was last seen, by a worker of the same machine."""
        entry: dict[str, Any] = {"rank": member, "host": self.hosts[member], "step": None, "phase": None}
        for word in words:
            if str(member) in word["seen"]:
                step, phase, ended = word["seen"][str(member)]
                entry |= {"step": step, "phase": NAMES[phase], "hung": bool(ended)}
        return entry

    def _look_for_poison(self, step: int, died: Sequence[Mapping[str, Any]], before: Sequence[int]) -> None:
        """Raises PoisonError where a shard's owner died while it computed it, for the second time at this step."""
        if self._suspected_at != step:
            self._suspects, self._suspected_at = {}, step
        own = {NAMES[phase] for phase in OWN}
        membership = self.meeting.membership
        for entry in died:
            if entry["step"] != step or entry["phase"] not in own:
                continue
            for shard in range(*membership.owned_by(before.index(entry["rank"]))):
                ranks = self._suspects.setdefault(shard, [])
                ranks.append(entry["rank"])
                if len(ranks) > 1:
                    raise for_all(
                        PoisonError(
                            f"shard {shard} at step {step}",
                            expected="its owner to live",
                            found=f"that ranks {ranks[0]} and {ranks[1]}, who owned it one after the other, died there",
                            cure="look at that shard's rows and at the model: whatever is in them ends every worker",
                        )
                    )

    def _catch_up(self, newest: Mapping[str, Any]) -> None:
        """Do what the others have done already."""
        worker = self.worker
        state = worker.state
        if newest["step"] > state.step:
            store, side = worker.exchange.store, newest["side"]
            ahead = State(
                newest["step"],
                newest["updates"],
                store.weights(side),
                store.slots(side),
                side,
                state.judgement,
                store.residuals(side),
            )
            worker.commit(ahead, _verdict(newest["verdict"]))
        elif newest["evaluated"] > state.judgement.evaluated:
            worker.judged(newest["figures"])


def _verdict(said: Mapping[str, Any]) -> Verdict:
    """A verdict as it came in a word. One that was acted on holds no failures."""
    compute, wait, phases = tuple(said["compute"]), tuple(said["wait"]), np.array(said["phases"])
    arrived = arrival(said["arrival"])
    again = {"failures": (), "compute": compute, "wait": wait, "phases": phases, "arrival": arrived}
    return Verdict(**{**said, **again})
