"""Tokens: 256 random bits each, of which a server keeps the SHA-256 alone, in a JSON file that only its owner can read.

A token is shown once, when it is made. It travels in the metadata of a call, and is given to a client in a file or in
the environment: never on a command line, which every user of a machine can read, and never in a log.
"""

import fcntl
import hashlib
import hmac
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from dptrain.errors import DptrainError, RefusedError, StorageError, UsageError

VARIABLE = "DPTRAIN_TOKEN"
HEADER = "authorization"
SCHEME = "Bearer "
"""How a token is shown with a call (RFC 6750)."""
PREFIX = "dptrain_"
"""Of every token, so that scanners of sources and logs know one when they see it."""
LONGEST_NAME = 64


class Role(StrEnum):
    """What a token is for, and what a method asks for."""

    any = "any"
    """Only asked for: whoever has a token, whatever it is for."""
    read = "read"
    submit = "submit"
    admin = "admin"
    worker = "worker"

    def grants(self, asked: "Role") -> bool:
        """Whether a token of this role may call a method that asks for ``asked``."""
        return asked in _GRANTED[self]


_GRANTED = {
    Role.any: {Role.any},
    Role.read: {Role.any, Role.read},
    Role.submit: {Role.any, Role.read, Role.submit},
    Role.worker: {Role.any, Role.worker},
    Role.admin: set(Role),
}


@dataclass(frozen=True, slots=True)
class Identity:
    """Who calls, as a server knows them."""

    name: str
    role: Role


class Keys(Protocol):
    """What knows the tokens of a server."""

    def identify(self, token: str) -> Identity | None:
        """Whose token it is, in a time that tells nothing about the tokens there are; None: nobody's."""
        ...


@dataclass(frozen=True, slots=True)
class Entry:
    """A token as it is kept."""

    name: str
    role: str
    sha256: str
    created: str


def fresh() -> str:
    """A new token."""
    return PREFIX + secrets.token_urlsafe(32)


def digest(token: str) -> str:
    """What is kept of a token. Nobody guesses 256 random bits, so a slow hash would protect nothing more."""
    # What is no text at all is nobody's token, like any other.
    return hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()


class TokenFile:
    """The tokens of a server, in a file (0600). Changed by several processes one after the other, and read again when
    it has changed: a revoked token is refused at its next call.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int, int] | None = None
        self._entries: tuple[Entry, ...] = ()

    def create(self, name: str, role: Role) -> str:
        """Add a token and return it, which nobody can do again. Raises UsageError, StorageError."""
        if not name or len(name) > LONGEST_NAME or not name.isprintable():
            raise UsageError(
                "token name",
                expected=f"1 to {LONGEST_NAME} printable characters",
                found=repr(name),
                cure="choose another name",
            )
        if role is Role.any:
            raise UsageError("token role", expected="read, submit, admin or worker", found="any", cure="choose one")
        token = fresh()
        with self._alone():
            entries = self.entries() if self.path.exists() else ()
            if any(entry.name == name for entry in entries):
                raise UsageError(
                    f"{self.path}", expected="a new name", found=f"a token named {name!r}", cure="choose another name"
                )
            now = datetime.now(UTC).isoformat(timespec="seconds")
            self._write((*entries, Entry(name, role.value, digest(token), now)))
        return token

    def revoke(self, name: str) -> None:
        """Take a token out. Raises UsageError where there is none of that name."""
        with self._alone():
            entries = self.entries()
            left = tuple(entry for entry in entries if entry.name != name)
            if len(left) == len(entries):
                raise UsageError(
                    f"{self.path}",
                    expected="the name of a token",
                    found=repr(name),
                    cure="dptrain token list says which there are",
                )
            self._write(left)

    def entries(self) -> tuple[Entry, ...]:
        """All tokens, without what would let anybody in. Raises StorageError, RefusedError."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                seen = (status.st_ino, status.st_mtime_ns, status.st_size)
                if seen != self._seen:
                    _only_owner(self.path, status)
                    self._entries = _parsed(self.path, file.read())
                    self._seen = seen
        except OSError as error:
            raise StorageError(
                f"{self.path}",
                expected="a file of tokens",
                found=error.strerror or str(error),
                cure="dptrain token create makes one",
            ) from None
        return self._entries

    def identify(self, token: str) -> Identity | None:
        """As Keys says. A file that can't be read lets nobody in, aloud."""
        found = None
        asked = digest(token)
        for entry in self.entries():
            if hmac.compare_digest(entry.sha256, asked):
                found = Identity(entry.name, Role(entry.role))
        return found

    @contextmanager
    def _alone(self) -> Iterator[None]:
        try:
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def _write(self, entries: tuple[Entry, ...]) -> None:
        new = self.path.with_name(f".{self.path.name}.new")
        text = json.dumps({"tokens": [asdict(entry) for entry in entries]}, indent=2) + "\n"
        try:
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self.path)
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> StorageError:
        return StorageError(
            f"{self.path}",
            expected="room and leave to write it",
            found=error.strerror or str(error),
            cure="choose a folder that is yours",
        )


def find(path: Path | None, environment: Mapping[str, str]) -> str | None:
    """A client's token: the file's if given, else DPTRAIN_TOKEN's, else none. Raises StorageError, RefusedError."""
    if path is None:
        return _plausible(VARIABLE, environment[VARIABLE]) if environment.get(VARIABLE) else None
    try:
        with path.open("rb") as file:
            _only_owner(path, os.fstat(file.fileno()))
            text = file.read(4096)
    except OSError as error:
        raise StorageError(
            f"{path}",
            expected="a file with a token",
            found=error.strerror or str(error),
            cure="dptrain token create --out writes one",
        ) from None
    return _plausible(str(path), text.decode("ascii", "replace"))


def keep(path: Path, make: Callable[[], str]) -> None:
    """Write the token that ``make`` makes to a new file (0600) for ``find``. Raises StorageError; then none is made."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise StorageError(
            f"{path}",
            expected="room for a new file",
            found=error.strerror or str(error),
            cure="choose another name; nothing is overwritten",
        ) from None
    with open(descriptor, "w") as file:
        try:
            file.write(make() + "\n")
        except DptrainError:
            path.unlink()
            raise


def _plausible(where: str, text: str) -> str:
    token = text.strip()
    if not token or not token.isascii() or not all(c.isalnum() or c in "-_" for c in token):
        raise UsageError(
            where, expected="a token alone", found="something else", cure="give it what dptrain token create printed"
        )
    return token


def _parsed(path: Path, text: bytes) -> tuple[Entry, ...]:
    try:
        entries = tuple(Entry(**entry) for entry in json.loads(text)["tokens"])
        for entry in entries:
            Role(entry.role)
            if len(bytes.fromhex(entry.sha256)) != 32:
                raise ValueError(entry.name)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise StorageError(
            f"{path}",
            expected="tokens as dptrain token create writes them",
            found="something else",
            cure="make the file anew",
        ) from None
    return entries


def _only_owner(path: Path, status: os.stat_result) -> None:
    if stat.S_ISREG(status.st_mode) and status.st_mode & 0o077:
        raise RefusedError(
            f"{path}",
            expected="a file that only its owner can read",
            found=f"mode {status.st_mode & 0o777:04o}",
            cure=f"chmod 600 {path}",
        )
