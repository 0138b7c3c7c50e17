"""The doer: brings the jobs that are to run and the processes that run together, again and again.

One thread. It waits for changes of the store, for keepers to end and for deadlines, and does what the scheduler says.
Everything is written to the store before it is done, so that another conductor, after this one was killed, sees what
may have been done, and looks.
"""

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable, Container, Mapping
from typing import Any

from dptrain.errors import DptrainError, NotFoundError, RefusedTransition
from dptrain.service import below, books, keeper, runner, scheduler, verbs
from dptrain.service.model import ENDED, Job, Reason, State
from dptrain.service.nodes import NodeState
from dptrain.service.runner import Alive, Runner
from dptrain.service.scheduler import Kept, Running, Waiting
from dptrain.service.store import Store
from dptrain.wanted import HERE, Workers

Tell = Callable[..., None]

SOON = 0.05
"""Seconds between looks at a launch that has not begun to train yet, or whose keeper can't be found yet."""

SEEN = 0.5
"""Seconds between looks whether a supervisor starts its job again."""

RETENTION_SECONDS = 60.0
"""Seconds between looks at what has outlived its time."""

_REST = 3.0
"""After a plan it rests for so many times as long as the plan took, so that a long queue leaves the server its core."""


States = Callable[[], Mapping[str, tuple[NodeState, int]]]


class Conductor:
    """Runs the jobs of a store on ``slots`` slots from ``start`` until ``close``; the jobs go on after that.

    ``tell(event, **fields)`` is for the server's log. ``keep`` = (seconds, bytes) bounds what has ended; 0: no bound.
    With ``nodes``, which tells where nodes stand and how many slots they have, jobs run there and none here. A job has
    its number of workers for ``settled`` seconds at least.
    """

    def __init__(
        self,
        store: Store,
        run: Runner,
        slots: int,
        tell: Tell,
        keep: tuple[float, int] = (0.0, 0),
        nodes: States | None = None,
        settled: float = scheduler.SETTLED,
    ) -> None:
        self.store, self.runner, self.tell, self.keep = store, run, tell, keep
        self._slots, self._nodes, self._settled = slots, nodes, settled
        self._placed: dict[str, dict[str, int]] = {}
        self._changing: set[str] = set()
        """Of these jobs workers come or leave; so many as asked for are not there yet, or more are."""
        self._changed_at: dict[str, float] = {}
        self._short: set[str] = set()
        """Of these jobs not all came that were asked for."""
        self._swift: dict[str, bool] = {}
        self.reasons: dict[str, tuple[Reason, str]] = {}
        self._jobs: dict[str, Job] = {}
        self._alive: dict[str, Alive] = {}
        self._asked: dict[str, tuple[int, bool]] = {}
        self._dirty: set[str] = set()
        self._lock = threading.Lock()
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(self._event, select.POLLIN)
        self._ends = False
        self._next_retention = 0.0
        self._planned = 0.0
        self._plan_wake: float | None = None
        self._moved = True
        self._thread = threading.Thread(target=self._go, name="conductor", daemon=True)
        store.bell.listen(self._changed)

    def start(self) -> None:
        """Find the jobs again that an earlier server has left, then begin."""
        for job_id in self.store.removed():
            self._remove(job_id)
        for job in self.store.active():
            self._jobs[job.id] = job
            if job.live:
                self.tell("job found again", job=job.id, state=job.state.name, launch=job.launch)
                if self._nodes is not None:
                    self._placed[job.id] = self.runner.placed(job.id)
                asked = self.runner.asked(job.id) if self._comes_and_goes(job) else None
                if job.state is State.RUNNING and asked is not None and sum(asked.values()) != job.workers:
                    self._changing.add(job.id)
                self._look(job)
        self._thread.start()

    def close(self) -> None:
        """Stop conducting. Jobs go on."""
        self._ends = True
        self._ring()
        if self._thread.is_alive():
            self._thread.join()
        for alive in self._alive.values():
            if alive.handle >= 0:
                os.close(alive.handle)
        self._alive.clear()
        runner.reap()
        with self._lock:
            os.close(self._event)
            self._event = -1

    def look_again(self) -> None:
        """Plan anew: what there is to run on has changed. Any thread may call it."""
        with self._lock:
            self._moved = True
            self._ring()

    @property
    def slots(self) -> int:
        """How many there are to run on."""
        if self._nodes is None:
            return self._slots
        return sum(slots for state, slots in self._nodes().values() if state is NodeState.READY)

    def free_of(self, name: str, slots: int) -> int:
        """How many of a node's slots are free."""
        live = [job.id for job in list(self._jobs.values()) if job.live]
        return slots - sum(self._placed.get(job_id, {}).get(name, 0) for job_id in live)

    @property
    def free(self) -> int:
        """How many slots are free."""
        return self.slots - sum(job.workers for job in list(self._jobs.values()) if job.live)

    def running(self) -> list[str]:
        """The jobs that train now."""
        return [job.id for job in list(self._jobs.values()) if job.state is State.RUNNING]

    def why(self, job: Job) -> tuple[Reason, str]:
        """Why a job is in its state: of one that waits, what the scheduler last said."""
        if not job.waits:
            return job.reason, job.message
        reason, message = self.reasons.get(job.id, (Reason.UNSPECIFIED, ""))
        if reason is Reason.BACK_OFF:
            left = max(0.0, job.not_before - time.time())
            return job.reason or reason, f"{job.message}, in {left:.0f} s"
        if reason is Reason.UNSPECIFIED:
            return job.reason, job.message or "is about to start"
        return reason, f"{job.message}; {message}" if job.message else message

    def _changed(self, keys: tuple[str, ...]) -> None:
        with self._lock:
            self._dirty.update(key for key in keys if key and not key.startswith("file:"))
            if self._dirty:
                self._ring()

    def _ring(self) -> None:
        if self._event >= 0:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_write(self._event, 1)

    def _go(self) -> None:
        while not self._ends:
            try:
                self._refresh()
                self._observe()
                self._schedule()
                self._retain()
                self._wait()
            except DptrainError as error:
                # A full disk, say: nothing was lost, and the next turn tries again.
                self.tell("error", error=str(error))
                select.select([self._event], [], [], 1.0)

    def _refresh(self) -> None:
        with self._lock:
            dirty, self._dirty = self._dirty, set()
        self._moved = self._moved or bool(dirty)
        for job_id in dirty:
            try:
                job = self.store.get(job_id)
            except NotFoundError:
                self._jobs.pop(job_id, None)
                self._remove(job_id)
                continue
            if job.state in ENDED or job.state is State.PAUSED:
                self._jobs.pop(job_id, None)
                self.reasons.pop(job_id, None)
            else:
                self._jobs[job_id] = job

    def _observe(self) -> None:
        """Look at everything that holds slots."""
        now = time.time()
        for job in [job for job in self._jobs.values() if job.live]:
            alive = self._alive.get(job.id)
            if alive is None or alive.handle < 0 or _readable(alive.handle):
                self._look(job)
                continue
            if job.state is State.STARTING and self.runner.trains(job.id, job.launch):
                self._change(job.id, lambda job: verbs.running(job) if job.state is State.STARTING else job)
            if job.state in (State.RUNNING, State.RECOVERING):
                self._see(job)
            spent = job.trained + now - job.started
            if job.state is not State.CANCELLING and 0 < job.spec.max_seconds < spent:
                self._change(job.id, lambda job: verbs.too_long(job, now, scheduler.BACK_OFF * 30))
            if job.state in (State.PAUSING, State.CANCELLING):
                self._ask(job, alive, now)

    def _see(self, job: Job) -> None:
        """See whether a job that trains is being started again by its supervisor, or trains again."""
        restart = self.runner.restart(job.id, job.launch)
        if restart is None and job.state is State.RUNNING and job.id in self._changing:
            self._see_workers(job)
        if (restart is not None) == (job.state is State.RECOVERING):
            return

        def decide(now: Job) -> Job:
            if now.state is not job.state or now.launch != job.launch:
                return now
            return verbs.running(now) if restart is None else verbs.restarting(now, restart)

        self._change(job.id, decide)

    def _see_workers(self, job: Job) -> None:
        """See whether the workers have come, or left, that were to."""
        there, asked = self.runner.there(job.id), self.runner.asked(job.id)
        if there is None:
            return
        workers = sum(there.values())
        self._changing.discard(job.id)
        self._changed_at[job.id] = time.time()
        if dict(there) == dict(asked or {}):
            self._short.discard(job.id)
        else:
            # Who does not come now need not come in a moment.
            self._short.add(job.id)
            self._changed_at[job.id] += self._settled
        if self._nodes is not None:
            self._placed[job.id] = dict(there)
        launch = job.launch
        self.tell("job workers", job=job.id, workers=workers)

        def decide(now: Job) -> Job:
            same = now.state is State.RUNNING and now.launch == launch
            return verbs.running(now, workers) if same else now

        self._change(job.id, decide)

    def _comes_and_goes(self, job: Job) -> bool:
        """Whether its workers can come and leave at a step."""
        if job.id not in self._swift:
            # Those of an earlier server come without the text of their job files.
            whole = job if job.spec.run_toml else self.store.get(job.id)
            self._swift[job.id] = runner.swift(whole)
        return self._swift[job.id]

    def _reshape(self, job: Job, workers: Workers, why: str = "") -> None:
        """Have a job that trains have other workers from some step on. Raises RefusedTransition."""
        asked, held = sum(workers.values()), dict(workers)
        if self._nodes is not None:
            # Slots are held for as long as anybody may be there.
            for name, slots in self._placed.get(job.id, {}).items():
                held[name] = max(slots, held.get(name, 0))
        self._change(job.id, lambda now: verbs.reshaping(now, asked, why, sum(held.values())))
        if self._nodes is not None:
            self._placed[job.id] = held
        self._changing.add(job.id)
        self.tell("job resized", job=job.id, workers=asked)
        self.runner.reshape(job.id, workers)

    def _ask(self, job: Job, alive: Alive, now: float) -> None:
        kill = 0 < job.kill_at <= now
        if self._asked.get(job.id) != (job.launch, kill):
            self._asked[job.id] = (job.launch, kill)
            self.runner.ask(alive.pid, kill=kill)

    def _look(self, job: Job) -> None:
        """See what has become of a job's launch, and write it down where it has ended."""
        self._let_go(job.id)
        sight = self.runner.look(job.id, job.launch)
        if isinstance(sight, Alive):
            self._hold(job.id, sight)
            return
        done, newest = self.runner.done(job.id), self.runner.newest_step(job.id)
        said = books.last_error(self.runner.folder(job.id) / keeper.LOG, job.started)
        launch = job.launch

        def decide(job: Job) -> Job:
            if job.launch != launch or not job.live:
                return job
            return verbs.ended(job, sight, done=done, newest=newest, said=said, now=time.time())

        after = self._change(job.id, decide)
        if after is not None and after.state in ENDED:
            self._weigh(job.id)

    def _schedule(self) -> None:
        now = time.time()
        due = self._plan_wake is not None and now >= self._plan_wake
        if not (self._moved or due):
            return
        began = time.perf_counter()
        self._moved = False
        self._move(now)
        jobs = list(self._jobs.values())
        waiting = [_waiting(job) for job in jobs if job.waits]
        found = scheduler.plan(waiting, [self._running(job) for job in jobs if job.live], self.slots, now)
        self.reasons = dict(found.reasons)
        self._plan_wake = found.wake
        for job_id, workers in found.starts.items():
            self._start(job_id, workers)
        for job_id, workers in found.resizes.items():
            with contextlib.suppress(RefusedTransition):
                self._resize(self._jobs[job_id], workers)
        self._planned = time.perf_counter() - began

    def _resize(self, job: Job, workers: int) -> None:
        """Have a job that trains go on with so many workers: at a step where it can, else from a checkpoint."""
        if not self._comes_and_goes(job):
            self._change(job.id, lambda job: verbs.resize(job, time.time(), workers))
        elif self._nodes is None:
            self._reshape(job, {HERE: workers})
        else:
            placed = scheduler.reshaped(self._placed[job.id], workers, self._free_slots())
            if placed != self._placed[job.id]:
                self._reshape(job, placed)

    def _free_slots(self) -> dict[str, int]:
        """The free slots of the nodes that take work."""
        assert self._nodes is not None
        ready = {name: slots for name, (state, slots) in self._nodes().items() if state is NodeState.READY}
        return {name: self.free_of(name, slots) for name, slots in ready.items()}

    def _flow(self, job: Job, drained: Container[str]) -> bool:
        """Have a job's workers leave nodes at a step, and come to others; False where that can't be."""
        if job.state is not State.RUNNING or job.id in self._short or not self._comes_and_goes(job):
            return False
        placed = self._placed.get(job.id, {})
        left = {name: slots for name, slots in placed.items() if name not in drained}
        target = scheduler.reshaped(left, sum(placed.values()), self._free_slots())
        if sum(target.values()) < job.spec.workers[0]:
            return False
        self._reshape(job, target, f", off node {', '.join(sorted(placed.keys() - left.keys()))}")
        return True

    def _move(self, now: float) -> None:
        """Have jobs go on elsewhere that have workers on a node which was drained."""
        if self._nodes is None:
            return
        states = self._nodes()
        drained = {name for name, (state, _) in states.items() if state is NodeState.DRAINED}
        for job in [job for job in self._jobs.values() if job.state in (State.STARTING, State.RUNNING)]:
            there = sorted(drained & self._placed.get(job.id, {}).keys())
            if there and job.id not in self._changing:
                with contextlib.suppress(RefusedTransition):
                    if self._flow(job, drained):
                        continue
                with contextlib.suppress(RefusedTransition):
                    self._change(job.id, lambda job, node=there[0]: verbs.move(job, now, node))  # type: ignore[misc]

    def _start(self, job_id: str, workers: int) -> None:
        placed = None
        if self._nodes is not None:
            placed = scheduler.place(workers, self._free_slots())
            if sum(placed.values()) < workers:
                # A node went since the plan was made; the next one knows.
                self._moved = True
                return

        def decide(job: Job) -> Job:
            return verbs.starting(job, time.time(), workers) if job.waits else job

        job = self._change(job_id, decide)
        if job is None or job.state is not State.STARTING:
            return
        self._let_go(job_id)
        self._changing.discard(job_id)
        self._short.discard(job_id)
        self._changed_at.pop(job_id, None)
        if placed is not None:
            self._placed[job_id] = placed
        sight = self.runner.start(job, job.launch, workers, placed)
        if isinstance(sight, Alive):
            self._hold(job_id, sight)

    def _running(self, job: Job) -> Running:
        """A job that holds slots, as the scheduler is told of it."""
        leaving = job.state in (State.PAUSING, State.CANCELLING)
        # A launch that does not train is left as it is.
        trains = job.state not in (State.STARTING, State.RECOVERING)
        least, most = job.spec.workers if trains else (job.workers, job.workers)
        changing = job.id in self._changing
        asked = self.runner.asked(job.id) if changing else None
        return Running(
            job.id,
            job.workers,
            least,
            most,
            job.spec.priority,
            self._changed_at.get(job.id, job.started),
            leaving,
            settles=min(scheduler.SWIFT, self._settled) if self._comes_and_goes(job) else self._settled,
            changing=changing,
            returned=max(0, job.workers - sum(asked.values())) if asked else 0,
        )

    def _change(self, job_id: str, decide: Callable[[Job], Job]) -> Job | None:
        """Change a job here and in the store; None where it is no more."""
        before = self._jobs.get(job_id)
        try:
            job = self.store.change(job_id, decide)
        except NotFoundError:
            return None
        if before is None or before.state is not job.state:
            fields: dict[str, Any] = {"job": job.id, "state": job.state.name, "reason": job.reason.name}
            self.tell("job", **fields, message=job.message, launch=job.launch, workers=job.workers)
        self._moved = True
        if job.state in ENDED or job.state is State.PAUSED:
            self._jobs.pop(job_id, None)
            self._placed.pop(job_id, None)
            self._changed_at.pop(job_id, None)
            self._swift.pop(job_id, None)
            self._changing.discard(job_id)
            self._short.discard(job_id)
        else:
            self._jobs[job_id] = job
        return job

    def _hold(self, job_id: str, alive: Alive) -> None:
        self._alive[job_id] = alive
        if alive.handle >= 0:
            self._poll.register(alive.handle, select.POLLIN)

    def _let_go(self, job_id: str) -> None:
        alive = self._alive.pop(job_id, None)
        if alive is not None and alive.handle >= 0:
            self._poll.unregister(alive.handle)
            os.close(alive.handle)

    def _retain(self) -> None:
        """Remove what has outlived its time, now and then."""
        now = time.time()
        if not any(self.keep) or now < self._next_retention:
            return
        self._next_retention = now + RETENTION_SECONDS
        for job_id, _, size in self.store.ended() if self.keep[1] else ():
            if not size:
                # It ended while it was paused or queued, or the server did before it was weighed.
                self._weigh(job_id)
        kept = [Kept(*row) for row in self.store.ended()]
        for job_id in scheduler.outlived(kept, now, *self.keep):
            with contextlib.suppress(NotFoundError, RefusedTransition):
                self.store.remove(job_id, verbs.removable)
                self.tell("job outlived", job=job_id)

    def _weigh(self, job_id: str) -> None:
        """Have the store know how many bytes a job's files take; at least one, or it would not seem to be known."""
        self.store.weigh(job_id, max(1, sum(found.size for found in below.walk(self.runner.folder(job_id)))))

    def _remove(self, job_id: str) -> None:
        """Remove the files of a job that is marked so, then what is known of it."""
        if job_id in self.store.removed():
            self.runner.remove(job_id)
            self.store.forget(job_id)

    def _wait(self) -> None:
        """Until something happens, or is due."""
        now = time.time()
        until = [now + RETENTION_SECONDS]
        for job in self._jobs.values():
            if job.live:
                alive = self._alive.get(job.id)
                if alive is None or alive.handle < 0 or job.state is State.STARTING:
                    until.append(now + SOON)
                if job.state in (State.RUNNING, State.RECOVERING):
                    until.append(now + SEEN)
                if job.kill_at and self._asked.get(job.id) != (job.launch, True):
                    until.append(job.kill_at)
                if job.spec.max_seconds and job.state is not State.CANCELLING:
                    until.append(job.started + job.spec.max_seconds - job.trained)
        if self._plan_wake is not None:
            until.append(self._plan_wake)
        if self._moved:
            until.append(now)
        rest = min(1.0, self._planned * _REST)
        self._planned = 0.0
        if rest > SOON:
            time.sleep(rest)
        ready = self._poll.poll(max(0.0, min(until) - time.time()) * 1000)
        if any(handle == self._event for handle, _ in ready):
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._event)


def _readable(handle: int) -> bool:
    return bool(select.select([handle], [], [], 0)[0])


def _waiting(job: Job) -> Waiting:
    least, most = job.spec.workers
    return Waiting(job.id, least, most, job.spec.priority, job.created, job.since or job.created, job.not_before)
