import pytest

from dptrain.phases import NAMES, OWN, Phase, Phases


class Clock:
    now = 5.0

    def __call__(self) -> float:
        return self.now


def test_every_moment_belongs_to_the_phase_that_began_last() -> None:
    clock = Clock()
    phases = Phases(clock)
    for phase, seconds in ((Phase.DATA, 1.0), (Phase.FORWARD, 2.0), (Phase.FORWARD, 4.0), (Phase.WAITING, 8.0)):
        clock.now += 0.25 if phase is Phase.DATA else 0.0
        phases.begin(phase, "a layer")
        clock.now += seconds
    phases.begin(Phase.OTHER)
    expected = dict.fromkeys(NAMES, 0.0) | {"other": 0.25, "data": 1.0, "forward": 6.0, "waiting": 8.0}
    assert phases.named() == expected
    assert sum(phases.seconds) == clock.now - 5.0


def test_starting_forgets_what_was() -> None:
    clock = Clock()
    phases = Phases(clock)
    phases.at(3)
    clock.now += 7
    phases.begin(Phase.UPDATE)
    phases.start()
    clock.now += 1
    phases.begin(Phase.DATA)
    assert phases.seconds[Phase.OTHER] == 1
    assert sum(phases.seconds) == 1
    assert phases.step == 0


def test_the_clock_is_the_systems_unless_another_is_given() -> None:
    phases = Phases()
    phases.begin(Phase.DATA)
    phases.begin(Phase.OTHER)
    assert all(seconds >= 0 for seconds in phases.seconds)


@pytest.mark.parametrize("phase", list(Phase))
def test_names_stand_at_their_phases_place(phase: Phase) -> None:
    assert NAMES[phase] == phase.name.lower()
    assert (phase in OWN) == (NAMES[phase] in ("data", "forward", "backward", "partials"))
