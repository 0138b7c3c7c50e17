"""Silent corruption: a worker whose memory or arithmetic gives other bits is found, named and left behind.

Every so often all that hold a state of their own compare its digests, and one worker's gradient is computed by
another too. Digests decide nothing but who is wrong; then all go back to a state that was agreed on before, so the
result is that of the undisturbed run.
"""

import contextlib
import hashlib
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dptrain import checkpoint
from dptrain.chronicle import Chronicle
from dptrain.errors import CorruptionError, DisagreementError, StorageError, WorkerLost
from dptrain.job import spec
from dptrain.layout import Array, digest
from dptrain.meeting import Meeting, for_all
from dptrain.nn.accumulate import Loaded, Partials, Residuals
from dptrain.phases import Phase
from dptrain.state import State
from dptrain.tree import Node
from dptrain.worker import Worker, together

_COMPARING, _RECHECKING = "comparing states", "rechecking a gradient"
_STATE, _GRADIENT = "state", "gradient"


class Finding(NamedTuple):
    """Bits that differ: ``what``, at ``step``. Workers go by their ranks at the launch.

    ``wrong`` are those known to be wrong, none where nobody can tell; ``among`` all that it may be. No state after
    the step ``trusted`` is.
    """

    kind: str
    step: int
    what: str
    wrong: Sequence[int]
    among: Sequence[int]
    trusted: int


class Choice(NamedTuple):
    """What is rechecked: a node of the tree, which is row ``row`` of the ``owner``'s outbox, by the ``checker``."""

    owner: int
    row: int
    node: Node
    checker: int


def chosen(seed: int, turn: int, nodes: Sequence[Sequence[Node]]) -> Choice:
    """What to recheck in a turn, of several workers' nodes; each node comes once in as many turns as there are nodes.

    Drawn by a hash: nothing that training draws depends on it.
    """
    offered = [(rank, row, node) for rank, some in enumerate(nodes) for row, node in enumerate(some)]
    cycle, place = divmod(turn, len(offered))
    order = sorted(range(len(offered)), key=lambda i: _draw(seed, cycle, i))
    owner, row, node = offered[order[place]]
    others = [rank for rank in range(len(nodes)) if rank != owner]
    return Choice(owner, row, node, others[_draw(seed, turn) % len(others)])


def _draw(*words: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:8], "little")


def outvoted(digests: Mapping[int, str]) -> tuple[set[int], set[int]]:
    """Of several that should hold the same: who is wrong, and among whom it is.

    A strict majority is right. Without one nobody is known to be wrong, and it may be any of them.
    """
    counts = Counter(digests.values())
    if len(counts) < 2:
        return set(), set()
    common, count = counts.most_common(1)[0]
    if 2 * count <= len(digests):
        return set(), set(digests)
    wrong = {rank for rank, found in digests.items() if found != common}
    return wrong, wrong


def contradicted(owner: tuple[str, str], checker: tuple[str, str], third: str) -> tuple[bool, bool]:
    """Whether the owner and the checker of a gradient are wrong, by what each found at first and found again.

    They differed at first. Who doesn't find the same again is wrong, whatever it found then; where both do, a
    ``third`` decides, "" where there is none: then neither is known to be wrong.
    """
    owner_repeats, checker_repeats = owner[0] == owner[1], checker[0] == checker[1]
    if owner_repeats and checker_repeats:
        return third == checker[0], third == owner[0]
    return not owner_repeats, not checker_repeats


def set_aside(folder: Path, trusted: int) -> None:
    """Let the checkpoints of later steps than ``trusted`` be none any more. Nobody may be writing there."""
    for generation in checkpoint.generations(folder):
        if checkpoint.step_of(generation) > trusted:
            try:
                checkpoint.set_aside(generation)
            except OSError as error:
                raise StorageError(
                    f"checkpoint {generation}",
                    expected="to be renamed, as it can't be trusted",
                    found=error.strerror or str(error),
                    cure="remove it, then go on with --resume",
                ) from None
    if folder.is_dir():
        checkpoint.flush_folder(folder)


def checkpoints_up_to(folder: Path, trusted: int) -> list[Path]:
    """The checkpoints of steps up to ``trusted``, newest first."""
    return [generation for generation in checkpoint.generations(folder) if checkpoint.step_of(generation) <= trusted]


class Auditor:
    """One worker's part in finding silent corruption; see worker.Auditor. ``hosts`` are by rank at the launch.

    ``go_back`` makes the newest checkpoint up to a step, or else the start of the run, everybody's state;
    ``distrust``, on the chief, sets newer checkpoints aside. ``repeatable`` says whether gradients can be rechecked.
    """

    def __init__(
        self,
        worker: Worker,
        meeting: Meeting,
        chronicle: Chronicle,
        hosts: Mapping[int, str],
        wanted: spec.Exchange,
        *,
        seed: int,
        repeatable: bool,
        go_back: Callable[[int], State],
        distrust: Callable[[int], None],
    ) -> None:
        self.worker, self.meeting, self.chronicle, self.hosts = worker, meeting, chronicle, hosts
        self.communicator = meeting.communicator
        self.compare_steps = wanted.compare_steps
        self.recheck_steps = wanted.recheck_steps if repeatable else 0
        self.seed = seed
        self.finding: Finding | None = None
        self._go_back, self._distrust = go_back, distrust
        self._agreed = worker.state.step
        # The last step at which a worker's gradient was found to be right, and the first from which it might not be.
        self._cleared: dict[int, int] = {}
        self._begun = worker.state.step
        # The step of a finding that nobody could decide, until there is an agreement as far on.
        self._doubts: dict[str, int] = {}
        self._scratch: Array | None = None
        self._trust()

    def settle(self) -> None:
        """Go back, where that is to be done; all workers call it, with the same finding or none."""
        finding = self.finding
        if finding is None:
            return
        worker = self.worker
        worker.phases.begin(Phase.CHECKPOINT)
        worker.state = self._go_back(finding.trusted)
        self._agreed = self._begun = worker.state.step
        self._cleared = {}
        self._trust()
        if not finding.wrong:
            self._doubts[finding.kind] = finding.step
        self.finding = None
        goes_on = "go on without" if finding.wrong else "go on together, as nobody can tell who is wrong"
        them = "" if not finding.wrong else " it" if len(finding.wrong) == 1 else " them"
        text = f"{self._said(finding)}: the workers go back to step {worker.state.step} and {goes_on}{them}"
        worker.try_to_watch(lambda: self.chronicle.observer.warned(text))
        self._write(finding, worker.state.step)
        worker.phases.begin(Phase.OTHER)

    def compare(self, state: State, *, last: bool = False) -> bool:
        """See worker.Auditor."""
        if not self.compare_steps or not (last or state.step % self.compare_steps == 0) or not self._several:
            return True
        phases = self.worker.phases
        phases.begin(Phase.OTHER)
        mine = together(self.communicator, _COMPARING, lambda: self._digests(state))
        phases.begin(Phase.WAITING, _COMPARING)
        every = self.communicator.allgather_json(mine, _COMPARING)
        phases.begin(Phase.OTHER)
        wrong: set[int] = set()
        among: set[int] = set()
        names = []
        for name in dict.fromkeys(name for digests in every for name in digests):
            some, suspects = outvoted({rank: digests[name] for rank, digests in enumerate(every) if name in digests})
            if suspects:
                names.append(name)
            wrong |= some if name == "best" else self._all_that_share(some)
            among |= suspects if name == "best" else self._all_that_share(suspects)
        if among:
            return self._found(_STATE, state.step, " and ".join(names), wrong, among, self._agreed)
        self._agreed = state.step
        self._trust()
        self._lift(_STATE, state.step)
        return True

    def rechecks(self, state: State) -> bool:
        """See worker.Auditor."""
        wanted = self.recheck_steps and (state.step + 1) % self.recheck_steps == 0
        return bool(wanted) and self.communicator.size > 1

    def recheck(self, state: State, partials: Partials | None) -> bool:
        """See worker.Auditor."""
        step, communicator = state.step + 1, self.communicator
        if not self.rechecks(state):
            return True
        rank, phases = communicator.rank, self.worker.phases
        choice = chosen(self.seed, step // self.recheck_steps, self.worker.exchange.membership.nodes)
        pair = choice.owner, choice.checker
        mine = ""
        if partials is not None and rank == choice.owner:
            phases.begin(Phase.OTHER)
            mine = _digest(partials, choice.row)
        elif partials is not None and rank == choice.checker:
            mine = self._computed(state, choice.node)
        first = self._gathered([partials is not None, mine])
        owner, checker = (first[of][1] for of in pair)
        if not all(good for good, _ in first) or not (owner and checker):
            # A failure, which all are told of with this step or the next.
            return True
        members = [communicator.members[of] for of in pair]
        if owner == checker:
            self._cleared.update((member, step) for member in members)
            self._trust()
            self._lift(_GRADIENT, step)
            return True
        third = next((other for other in range(communicator.size) if other not in pair), -1)
        again = self._gathered(self._computed(state, choice.node) if rank in (*pair, third) else "")
        faults = contradicted((owner, again[pair[0]]), (checker, again[pair[1]]), again[third] if third >= 0 else "")
        wrong = {of for of, fault in zip(pair, faults, strict=True) if fault}
        trusted = min(self._cleared.get(member, self._begun) for member in members)
        if self.compare_steps and len(self._groups()) > 1:
            trusted = min(trusted, self._agreed)
        lo, hi = choice.node
        what = f"the gradient of shard {lo}" if hi - lo == 1 else f"the gradient of shards {lo} to {hi - 1}"
        return self._found(_GRADIENT, step, what, wrong, pair, trusted)

    def word(self) -> dict[str, Any]:
        """What the others have to know of this worker after a death."""
        return {
            "finding": None if self.finding is None else self.finding._asdict(),
            "agreed": self._agreed,
            "cleared": list(self._cleared.items()),
            "doubts": self._doubts,
        }

    def heard(self, words: Sequence[Mapping[str, Any]]) -> None:
        """Learn from all workers' words what some knew already: what one knows all had agreed on."""
        found = [word["finding"] for word in words if word["finding"] is not None]
        if found:
            self.finding = Finding(**found[0])
            self._die_if_wrong(self.finding)
        self._agreed = max(word["agreed"] for word in words)
        for word in words:
            for member, step in word["cleared"]:
                self._cleared[member] = max(step, self._cleared.get(member, step))
        self._trust()
        known = [word["doubts"] for word in words]
        self._doubts = {kind: step for kind, step in known[0].items() if all(kind in doubts for doubts in known)}

    @property
    def _several(self) -> bool:
        """Whether there is anything that is held more than once."""
        return self.communicator.size > 1 and (len(self._groups()) > 1 or self.worker.best is not None)

    def _groups(self) -> Sequence[Sequence[int]]:
        """Who has one state together; the first of them answers for it."""
        if self.meeting.kind == "node":
            return self.meeting.machines.groups
        return [(rank,) for rank in range(self.communicator.size)]

    def _all_that_share(self, ranks: Iterable[int]) -> set[int]:
        """The workers whose state is also that of one of these."""
        return {rank for group in self._groups() if not set(group).isdisjoint(ranks) for rank in group}

    def _digests(self, state: State) -> dict[str, str]:
        """The digests of what this worker holds, by name, as far as others should hold the same."""
        found = {}
        if self.communicator.rank in {group[0] for group in self._groups()}:
            found["weights"] = digest(state.weights)
            if self.meeting.kind != "allreduce":
                names = self.meeting.update.optimizer.slots
                found |= {name: digest(slot) for name, slot in zip(names, state.slots, strict=True)}
        if self.worker.best is not None:
            found["best"] = digest(self.worker.best)
        return found

    def _gathered(self, content: Any) -> list[Any]:
        self.worker.phases.begin(Phase.WAITING, _RECHECKING)
        every = self.communicator.allgather_json(content, _RECHECKING)
        self.worker.phases.begin(Phase.OTHER)
        return every

    def _computed(self, state: State, node: Node) -> str:
        """The digest of a node's gradient as this worker computes it; "" for a failure, told with the next step."""
        found = [""]

        def compute() -> None:
            found[0] = self._compute(state, node)

        self.worker.try_to_watch(compute)
        self.worker.phases.begin(Phase.OTHER)
        return found[0]

    def _compute(self, state: State, node: Node) -> str:
        accumulator, reader = self.worker.accumulator, self.worker.reader
        plan = accumulator.schedule(node.lo, node.hi)
        if self._scratch is None or len(self._scratch) < plan.slots:
            self._scratch = np.empty((plan.slots, len(state.weights)), state.weights.dtype)

        def load(lo: int, hi: int) -> Loaded:
            return reader.load(state.step, lo, hi, None)

        kept = Residuals(state.residuals, None) if state.residuals else None
        return _digest(accumulator.accumulate(state.weights, plan, self._scratch, state.step, load, kept), 0)

    def _trust(self) -> None:
        """Let the chronicle know up to which step all is trusted, whatever is found next: what is older may go."""
        steps = [self._agreed] if self.compare_steps and self._several else []
        if self.recheck_steps and self.communicator.size > 1:
            steps += [self._cleared.get(member, self._begun) for member in self.communicator.members]
        self.chronicle.trusted = min(steps, default=None)

    def _lift(self, kind: str, step: int) -> None:
        if self._doubts.get(kind, step) <= step:
            self._doubts.pop(kind, None)

    def _found(self, kind: str, step: int, what: str, wrong: Iterable[int], among: Iterable[int], trusted: int) -> bool:
        """Act on bits that differ; all workers have found the same. False where all have gone back together."""
        members = self.communicator.members
        known = sorted(members[rank] for rank in wrong)
        if len(known) == len(members):
            known = []
        finding = Finding(kind, step, what, known, sorted(members[rank] for rank in among), trusted)
        if not known and not self._doubts:
            self.finding = finding
            self.settle()
            return False
        if known and self.communicator.survives and self.meeting.survivable:
            self.finding = finding
            self.worker.phases.begin(Phase.RECOVERY)
            with contextlib.suppress(WorkerLost):
                # Who is wrong stays until all know it; if another dies meanwhile, those that live tell each other.
                self.communicator.barrier("leaving a worker behind")
            self._die_if_wrong(finding)
            raise WorkerLost(
                self._said(finding), expected="the same bits", found="others", cure="the job goes on without it"
            )
        # What is gone on from later must not be newer than what is trusted.
        together(self.communicator, "setting checkpoints aside", lambda: self._distrust(trusted))
        self._write(finding, None)
        raise for_all(self._error(finding))

    def _die_if_wrong(self, finding: Finding) -> None:
        """What is wrong with this worker may be anything: only a death that leaves nothing to do is sure to work."""
        if self.communicator.members[self.communicator.rank] in finding.wrong:
            os.kill(os.getpid(), signal.SIGKILL)

    def _error(self, finding: Finding) -> CorruptionError | DisagreementError:
        if finding.wrong:
            return CorruptionError(
                f"{self._named(finding.wrong)} at step {finding.step}",
                expected=f"{finding.what} as the other workers have it",
                found="other bits",
                cure="look at the memory and the processor there; go on with --resume, best without that machine",
            )
        return DisagreementError(
            f"{self._named(finding.among)} at step {finding.step}",
            expected=f"the same bits of {finding.what}",
            found="others, for the second time",
            cure="nobody can tell which is wrong: look at their memory and processors, then go on with --resume; with "
            "three or more workers, or machines, the others decide",
        )

    def _said(self, finding: Finding) -> str:
        who = self._named(finding.wrong or finding.among)
        if not finding.wrong:
            return f"{who} at step {finding.step} disagree on {finding.what}"
        has = "has" if len(finding.wrong) == 1 else "have"
        return f"{who} at step {finding.step} {has} wrong bits in {finding.what}"

    def _named(self, members: Sequence[int]) -> str:
        each = [f"{member} ({self.hosts[member]})" for member in members]
        return f"rank {each[0]}" if len(each) == 1 else f"ranks {', '.join(each[:-1])} and {each[-1]}"

    def _write(self, finding: Finding, back: int | None) -> None:
        """Into the chief's journal. ``back`` is the step that all went back to; None where the job fails."""
        journal = self.chronicle.journal
        if journal is None:
            return
        line = {
            "event": "corruption",
            "found_at": finding.step,
            "what": finding.what,
            "wrong": [{"rank": member, "host": self.hosts[member]} for member in finding.wrong],
            "among": [{"rank": member, "host": self.hosts[member]} for member in finding.among],
            "back_to": back,
        }
        try:
            journal.write(line)
        except StorageError as error:
            self.chronicle.observer.warned(f"not in the journal: {error}")


def _digest(partials: Partials, row: int) -> str:
    return digest(partials.vectors[row]) + digest(partials.tallies[row])
