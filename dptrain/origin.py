"""Where a run begins and what it goes back to: its directory, its checkpoints, or the weights before the first step."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dptrain import afar, checkpoint
from dptrain.corruption import checkpoints_up_to
from dptrain.errors import CheckpointError
from dptrain.exchange.communicator import Communicator
from dptrain.job.located import located
from dptrain.job.spec import Job
from dptrain.layout import Array, digest
from dptrain.parts import Parts
from dptrain.state import State
from dptrain.worker import together

if TYPE_CHECKING:
    from dptrain.beginning import Expected
    from dptrain.checkpoint import Snapshot

# What only the chief needs (run directory, checkpoints) is imported where it is used: eight ranks start on two cores.


class Origin:
    """All workers call its methods together; the chief reads and hands out. ``warned`` tells of what was passed over.

    ``manifest`` is that of the checkpoint which the state came from (None: from the first step), ``best`` the weights
    that were the best up to there, if any are kept; both are the same on all workers.
    """

    def __init__(
        self,
        job: Job,
        parts: Parts,
        communicator: Communicator,
        *,
        run_dir: Path | None,
        resume: bool,
        warned: Callable[[str], None],
    ) -> None:
        self.job, self.parts, self.communicator = job, parts, communicator
        self.wanted_dir, self.resume, self.warned = run_dir, resume, warned
        self.manifest: dict[str, Any] | None = None
        self.best: Array | None = None

    @property
    def _chief(self) -> bool:
        return self.communicator.rank == 0

    def begin(self) -> State:
        """The run directory and the state to start from, the same on all workers."""
        opened = together(self.communicator, "opening the run directory", self._open)
        self.run_dir = afar.place(self.communicator.broadcast_json(opened, "opening the run directory"))
        np.copyto(self.parts.exchange.store.weights(0), self.parts.start)
        self.start_digest = digest(self.parts.start) if self.job.model.init_from else ""
        del self.parts.start
        return self._hand_out(together(self.communicator, "reading the checkpoint", self._restore))

    def go_back(self, trusted: int, distrust: Callable[[int], None]) -> State:
        """The newest checkpoint up to a step, or else the start of the run, as everybody's state.

        ``distrust`` is called on the chief: checkpoints that are newer than that step are none any more.
        """
        snapshot = together(self.communicator, "going back", lambda: self._trusted(trusted, distrust))
        state = self._hand_out(snapshot)
        if self.manifest is None:
            together(self.communicator, "going back", lambda: self._start_again(state.weights))
            for vector in (*state.slots, *state.residuals):
                vector.fill(0)
            self.communicator.broadcast(state.weights, "going back")
        return state

    def _open(self) -> str | None:
        if not self._chief:
            return None
        from dptrain import beginning, rundir

        rundir.take_over()
        return str(beginning.directory(self.job, self.wanted_dir, resume=self.resume))

    def _restore(self) -> "Snapshot | None":
        """What to go on from, on the chief; only then is it certain that the run directory is this job's."""
        if not self._chief:
            return None
        from dptrain import beginning

        found = None
        if self.resume:
            found = beginning.restore(self.run_dir, self._expected(), self.warned)
            if found is None:
                self.parts.notes.append("no checkpoint yet: training starts at step 0")
        beginning.echo(self.run_dir, self.job, self.parts.plan["encoding"])
        return found

    def _hand_out(self, snapshot: "Snapshot | None") -> State:
        """The state of the chief's snapshot, everybody's. Where there is none, step 0 with whatever lies there."""
        store, names = self.parts.exchange.store, self.parts.update.optimizer.slots
        self.best = None
        header = snapshot.manifest if snapshot else None
        header = self.manifest = self.communicator.broadcast_json(header, "reading the checkpoint")
        state = State(0, 0, store.weights(0), store.slots(0), 0, residuals=store.residuals(0))
        kept = [checkpoint.residual(shard) for shard in range(len(state.residuals))]
        vectors = store.weights(0), *store.slots(0), *state.residuals
        if header is not None:
            if snapshot:
                for vector, name in zip(vectors, ("weights", *names, *kept), strict=True):
                    np.copyto(vector, snapshot.groups[name])
            if "best" in header["groups"]:
                self.best = snapshot.groups["best"].copy() if snapshot else np.empty_like(state.weights)
            for vector in (*vectors, *([self.best] if self.best is not None else [])):
                self.communicator.broadcast(vector, "handing out the checkpoint")
            from dptrain.checkpoint import judgement_of

            state = state._replace(
                step=header["step"],
                updates=header["updates"],
                judgement=judgement_of(header),
            )
        pending = header.get("pending", []) if header is not None else []
        if not self.parts.exchange.begin(state.step, self.parts.rule.total_steps, pending) and self._chief:
            missed = sum(batch < state.step for batch in pending)
            self.warned(
                f"{missed} of the batches that were begun are left out, and as many done again: this run was one with "
                "exchange.mode async or ssp, which would go on with those that are left"
            )
        return state

    def _trusted(self, trusted: int, distrust: Callable[[int], None]) -> "Snapshot | None":
        """The chief's newest checkpoint up to a step."""
        if not self._chief:
            return None
        from dptrain import beginning, rundir

        distrust(trusted)
        if not checkpoints_up_to(self.run_dir / rundir.CHECKPOINTS, trusted):
            return None
        return beginning.restore(self.run_dir, self._expected(), self.warned)

    def _start_again(self, weights: Array) -> None:
        """The weights before the first step, on the chief."""
        if not self._chief:
            return
        weights.fill(0)
        self.parts.assembly.model.initialise(weights, self.job.seed)
        if self.start_digest:
            from dptrain import beginning

            np.copyto(weights, beginning.warm_start(located(self.job), self.parts.assembly.model.layout))
            if digest(weights) != self.start_digest:
                raise CheckpointError(
                    f"model.init_from = {self.job.model.init_from!r}",
                    expected="the weights that this run began with",
                    found="others",
                    cure="name one checkpoint there, as step-<n>, and start again",
                )

    def _expected(self) -> "Expected":
        from dptrain.beginning import Expected

        return Expected(
            self.job,
            self.parts.digests,
            self.parts.probe.fingerprint,
            self.parts.arithmetic,
            self.parts.assembly.model.layout,
        )
