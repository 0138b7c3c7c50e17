"""A folder is occupied as long as anybody is in it, however they end."""

import subprocess
import sys
from pathlib import Path

from dptrain import afar, presence

_STAYS = """
import sys
from pathlib import Path
from dptrain import presence
with presence.alive(Path(sys.argv[1])):
    print("in", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_occupied_until_the_last_has_gone(tmp_path: Path) -> None:
    assert not presence.occupied(tmp_path)
    with presence.alive(tmp_path):
        assert presence.occupied(tmp_path)
        with presence.alive(tmp_path):
            pass
        assert presence.occupied(tmp_path)
    assert not presence.occupied(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_who_is_killed_is_there_no_more(tmp_path: Path) -> None:
    line = [sys.executable, "-c", _STAYS, str(tmp_path)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"in\n"
        assert presence.occupied(tmp_path)
        process.kill()
        process.wait()
        assert not presence.occupied(tmp_path)


def test_where_nothing_can_be_written_nobody_is_kept_from_training(tmp_path: Path) -> None:
    with presence.alive(tmp_path / "none"):
        assert not presence.occupied(tmp_path / "none")


def test_a_run_of_another_machine_has_no_sign_of_life_here() -> None:
    with presence.alive(afar.FarPath("run")):
        pass
