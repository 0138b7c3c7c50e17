import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dptrain.errors import RefusedError, StorageError, UsageError
from dptrain.wire import tokens
from dptrain.wire.tokens import Identity, Role, TokenFile


@pytest.fixture
def file(tmp_path: Path) -> TokenFile:
    return TokenFile(tmp_path / "tokens.json")


def test_a_token_is_kept_as_its_hash_alone_and_for_its_owner_alone(file: TokenFile) -> None:
    token = file.create("ada", Role.worker)
    assert file.identify(token) == Identity("ada", Role.worker)
    assert token not in file.path.read_text()
    assert file.path.stat().st_mode & 0o777 == 0o600
    assert {path.name for path in file.path.parent.iterdir()} == {"tokens.json"}


def test_another_token_is_nobodys(file: TokenFile) -> None:
    token = file.create("ada", Role.worker)
    for other in ("", token[:-1], token + "x", token.swapcase(), tokens.digest(token), tokens.fresh(), "ä"):
        assert file.identify(other) is None


def test_a_revoked_token_is_nobodys_for_another_process_at_once(file: TokenFile) -> None:
    token, left = file.create("ada", Role.worker), file.create("bob", Role.read)
    server = TokenFile(file.path)
    assert server.identify(token)
    file.revoke("ada")
    assert server.identify(token) is None
    assert server.identify(left)
    with pytest.raises(UsageError):
        file.revoke("ada")


def test_two_tokens_have_two_names(file: TokenFile) -> None:
    file.create("ada", Role.worker)
    with pytest.raises(UsageError):
        file.create("ada", Role.read)


@pytest.mark.parametrize("name", ["", "x" * 65, "a\nb", "a\tb", "\0"])
def test_names_are_readable(file: TokenFile, name: str) -> None:
    with pytest.raises(UsageError):
        file.create(name, Role.read)


def test_many_at_once_lose_none(file: TokenFile) -> None:
    threads = [threading.Thread(target=TokenFile(file.path).create, args=(f"w{i}", Role.worker)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(entry.name for entry in file.entries()) == sorted(f"w{i}" for i in range(16))


def test_a_file_that_others_can_read_is_refused(file: TokenFile) -> None:
    token = file.create("ada", Role.worker)
    file.path.chmod(0o640)
    with pytest.raises(RefusedError, match="chmod 600"):
        TokenFile(file.path).identify(token)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"tokens": [{}]}', '{"tokens": [{"name": 1}]}', "\0", '{"tokens": 3}']
)
def test_a_broken_file_lets_nobody_in(file: TokenFile, text: str) -> None:
    file.path.write_text(text)
    file.path.chmod(0o600)
    with pytest.raises(StorageError):
        file.identify(tokens.fresh())


def test_a_hash_that_is_none_lets_nobody_in(file: TokenFile) -> None:
    file.create("ada", Role.worker)
    kept = json.loads(file.path.read_text())
    kept["tokens"][0]["sha256"] = ""
    file.path.write_text(json.dumps(kept))
    with pytest.raises(StorageError):
        TokenFile(file.path).identify("")


@pytest.mark.parametrize("role", [role for role in Role if role is not Role.any])
def test_what_a_role_may(role: Role) -> None:
    allowed = {asked.value for asked in Role if role.grants(asked)}
    assert (
        allowed
        == {
            "read": {"any", "read"},
            "submit": {"any", "read", "submit"},
            "worker": {"any", "worker"},
            "admin": {"any", "read", "submit", "worker", "admin"},
        }[role.value]
    )


def test_a_client_finds_its_token(tmp_path: Path) -> None:
    path = tmp_path / "token"
    tokens.keep(path, lambda: "dptrain_file")
    assert path.stat().st_mode & 0o777 == 0o600
    assert tokens.find(path, {"DPTRAIN_TOKEN": "dptrain_environment"}) == "dptrain_file"
    assert tokens.find(None, {"DPTRAIN_TOKEN": "dptrain_environment"}) == "dptrain_environment"
    assert tokens.find(None, {}) is None
    path.chmod(0o644)
    with pytest.raises(RefusedError, match="chmod 600"):
        tokens.find(path, {})
    with pytest.raises(StorageError):
        tokens.find(tmp_path / "none", {})
    with pytest.raises(UsageError) as told:
        tokens.find(None, {"DPTRAIN_TOKEN": "my secret\n words"})
    assert "secret" not in str(told.value)


def test_nothing_is_overwritten_and_no_token_lost_in_it(file: TokenFile, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("mine")
    with pytest.raises(StorageError):
        tokens.keep(path, lambda: file.create("ada", Role.read))
    assert path.read_text() == "mine"
    assert not file.path.exists()


def test_on_the_command_line(tmp_path: Path) -> None:
    def dptrain(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "dptrain", "token", *arguments, "--tokens", "t.json"]
        return subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, timeout=60, env=dict(os.environ))

    printed = dptrain("create", "ada", "--role", "worker").stdout.strip()
    assert TokenFile(tmp_path / "t.json").identify(printed) == Identity("ada", Role.worker)
    made = dptrain("create", "bob", "--role", "admin", "--out", "bob.token")
    assert (made.stdout, made.stderr) == ("", "")
    assert [line.split("\t")[:2] for line in dptrain("list").stdout.splitlines()] == [
        ["ada", "worker"],
        ["bob", "admin"],
    ]
    assert dptrain("revoke", "ada").returncode == 0
    assert dptrain("revoke", "ada").returncode == 2
    kept = tokens.find(tmp_path / "bob.token", {})
    assert kept is not None
    assert TokenFile(tmp_path / "t.json").identify(kept) == Identity("bob", Role.admin)
