"""Residuals on their way between workers, at the chief: who is given a shard has its residual first."""

import time
from collections.abc import Sequence

from dptrain.errors import DeadlineError, ResidualsLost
from dptrain.exchange.parameter_server.assignment import LOOK, Assignment
from dptrain.exchange.parameter_server.hub import Hub
from dptrain.exchange.parameter_server.leases import Grant, Lease
from dptrain.exchange.parameter_server.residuals import Age, Ledger, parts


class Handover:
    """Of residuals of which the ``ledger`` knows where they are."""

    def __init__(self, hub: Hub, assignment: Assignment, ledger: Ledger, lease_seconds: float, deadline: float) -> None:
        self._hub, self._assignment, self.ledger = hub, assignment, ledger
        self._lease_seconds, self._deadline = lease_seconds, deadline
        self._patience = 0.0
        """Until then those that come back to another chief may have residuals that nobody else has."""

    def renew(self) -> None:
        """The servers are others now: workers come back to them and say what they have."""
        self._patience = time.monotonic() + self._lease_seconds
        with self._hub.changed:
            self.ledger.renew()

    def at(self, age: Age) -> None:
        """The residuals that count are those of this age."""
        with self._hub.changed:
            self.ledger.at(age)

    def committed(self, age: Age, computed: Sequence[Lease]) -> None:
        """A step counts, and these leases' residuals with it."""
        with self._hub.changed:
            self.ledger.committed(age, computed)

    def all_here(self, age: Age) -> None:
        """Have those of all shards here. Raises ResidualsLost, or what `Assignment.look_up` does."""
        with self._hub.changed:
            self.ledger.at(age)
            self.bring(range(len(self.ledger.rows)))

    def see_off(self) -> None:
        """Let those go that want to, once what only they have is here. Raises ResidualsLost."""
        hub, ledger = self._hub, self.ledger
        with hub.changed:
            leaving = [number for number, member in hub.members.items() if member.leaves]
            if not leaving:
                return
            if ledger.age is not None and ledger.age.updates:
                claims = hub.claims()
                theirs = [shard for shard in range(len(ledger.rows)) if {*ledger.holders(shard, claims)} <= {*leaving}]
                self.bring(theirs)
            for number in leaving:
                hub.lose(number, "left")

    def to(self, grants: Sequence[Grant]) -> list[Grant]:
        """The grants to members that are there still, once those have the residuals of their shards.

        To be called with the lock held. Raises ResidualsLost.
        """
        hub, ledger = self._hub, self.ledger
        lacking = [
            (shard, member)
            for some, member in grants
            for shard in range(some.lo, some.hi)
            if ledger.lacks(shard, member, hub.claims())
        ]
        self.bring([shard for shard, _ in lacking])
        for shard, member in lacking:
            if member in hub.members:
                for part in parts(ledger.rows[shard], shard, ledger.age or Age(0, 0)):
                    hub.send(member, residual=part)
        there = [grant for grant in grants if grant.member in hub.members]
        for some, member in there:
            for shard in range(some.lo, some.hi):
                ledger.granted(shard, member, hub.members[member].claims)
        return there

    def bring(self, shards: Sequence[int]) -> None:
        """Have the residuals of these shards here; to be called with the lock held. Raises ResidualsLost."""
        hub, ledger = self._hub, self.ledger
        until = time.monotonic() + self._deadline
        assert ledger.age is not None
        if not ledger.age.updates:
            for shard in shards:
                ledger.rows[shard].fill(0)
            return
        while missing := [shard for shard in shards if not ledger.here(shard)]:
            self._assignment.look_up()
            now, heard, claims = time.monotonic(), hub.heard(), hub.claims()
            asked = set()
            for shard in missing:
                holders = ledger.holders(shard, claims)
                if holders:
                    asked.add(holders[0])
                    question = ledger.ask(shard, holders[0])
                    if question is not None:
                        hub.send(holders[0], give=question)
                elif now > self._patience:
                    raise residuals_lost()
            for member in asked:
                if now - heard[member] > self._lease_seconds:
                    hub.lose(member, f"said nothing for {self._lease_seconds:g} s")
            if now > until:
                raise DeadlineError(
                    f"the parameter server at step {hub.step}",
                    expected=f"the residuals of all shards within {self._deadline:g} s",
                    found="some missing",
                    cure="see what the workers do, or raise exchange.deadline",
                )
            hub.changed.wait(LOOK)


def residuals_lost() -> ResidualsLost:
    """Some residuals are nowhere any more."""
    return ResidualsLost(
        "the parameter server",
        expected="the residuals of all shards",
        found="some gone with a worker",
        cure="the run goes back to where all were together",
    )
