"""Which jobs a list holds: filter, order and page token, as SQL with parameters."""

import base64
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dptrain.errors import UsageError
from dptrain.service.model import ENDED, Job, State

DEFAULT_PAGE, MOST_PAGE = 50, 1000
ORDERS = ("created", "priority", "updated")
_MOST_TEXT = 2000


class Listing(NamedTuple):
    """A page of jobs, and the token for the next one ("" where there is none)."""

    jobs: list[Job]
    next_page_token: str


@dataclass(frozen=True)
class Query:
    """A list that was asked for. ``owner`` None: everybody's."""

    owner: str | None
    size: int
    order: str = "created"
    descending: bool = True
    terms: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    after: tuple[Any, ...] = ()
    filter: str = field(default="", compare=False)

    @classmethod
    def of(cls, owner: str | None, size: int, token: str, filter_text: str, order_by: str) -> "Query":
        """A query from a request's fields. Raises UsageError for what is not understood."""
        if size < 0:
            raise UsageError("page_size", expected="0 or more", found=str(size), cure="leave it out for 50")
        order, descending = _order(order_by)
        terms = tuple(_terms(filter_text))
        query = cls(owner, min(size or DEFAULT_PAGE, MOST_PAGE), order, descending, terms, (), filter_text)
        return cls(owner, query.size, order, descending, terms, query._after(token), filter_text)

    def sql(self, columns: str) -> tuple[str, Sequence[Any]]:
        """The statement and its parameters; it asks for one more than a page, to know whether there are more."""
        conditions, values = ["NOT removed"], []
        if self.owner is not None:
            conditions.append("owner = ?")
            values.append(self.owner)
        for text, parameters in self.terms:
            conditions.append(text)
            values.extend(parameters)
        way, than = ("DESC", "<") if self.descending else ("ASC", ">")
        if self.after:
            conditions.append(f"({self.order}, id) {than} (?, ?)")
            values.extend(self.after)
        # What is searched through are indexes, which hold all of the conditions; only what is found is read whole.
        order = f"ORDER BY {self.order} {way}, id {way}"
        found = f"SELECT id FROM jobs WHERE {' AND '.join(conditions)} {order} LIMIT ?"
        return f"SELECT {columns} FROM jobs WHERE id IN ({found}) {order}", [*values, self.size + 1]

    def listing(self, found: Sequence[Job]) -> Listing:
        """The page that the statement's rows make."""
        jobs = list(found[: self.size])
        if len(found) <= self.size:
            return Listing(jobs, "")
        last = jobs[-1]
        key = last.spec.priority if self.order == "priority" else getattr(last, self.order)
        content = json.dumps([*self._identity, key, last.id])
        return Listing(jobs, base64.urlsafe_b64encode(content.encode()).decode())

    @property
    def _identity(self) -> list[Any]:
        return [self.order, self.descending, self.filter]

    def _after(self, token: str) -> tuple[Any, ...]:
        if not token:
            return ()
        try:
            *identity, key, last = json.loads(base64.urlsafe_b64decode(token.encode("ascii")))
            if identity == self._identity and isinstance(key, (int, float)) and isinstance(last, str):
                return key, last
            found = "one of another list"
        except (ValueError, TypeError):
            found = "something else"
        raise UsageError(
            "page_token",
            expected="next_page_token of a page with the same filter and order",
            found=found,
            cure="begin with an empty page_token",
        )


def _order(text: str) -> tuple[str, bool]:
    words = text.split() or ["created", "desc"]
    if words[0] not in ORDERS or words[1:] not in ([], ["asc"], ["desc"]):
        raise UsageError(
            "order_by",
            expected=f'one of {", ".join(ORDERS)}, with " asc" or " desc"',
            found=repr(text[:80]),
            cure='such as "priority desc"',
        )
    return words[0], words[1:] == ["desc"]


def _terms(text: str) -> list[tuple[str, tuple[Any, ...]]]:
    if len(text) > _MOST_TEXT:
        raise _refused(f"{len(text)} characters", f"at most {_MOST_TEXT}")
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise _refused(str(error), "terms such as state=RUNNING") from None
    return [_term(word) for word in words]


def _term(word: str) -> tuple[str, tuple[Any, ...]]:
    key, equals, value = word.partition("=")
    if equals and key == "state":
        names = {name.strip().upper() for name in value.split(",")}
        if names <= State.__members__.keys():
            return f"state IN ({', '.join('?' * len(names))})", tuple(sorted(State[name] for name in names))
        raise _refused(repr(value[:80]), "states such as state=RUNNING,QUEUED")
    if equals and key == "active" and value in ("true", "false"):
        states = sorted({*State} - ENDED if value == "true" else ENDED)
        return f"state IN ({', '.join('?' * len(states))})", tuple(states)
    if equals and key == "name":
        return "instr(lower(name), lower(?)) > 0", (value,)
    if equals and key == "owner":
        return "owner = ?", (value,)
    if equals and key == "id":
        return "(id >= ? AND id < ?)", (value.lower(), value.lower() + "~")
    if equals and key.startswith("label."):
        # Jobs without such a text in their labels need not have them taken apart.
        label = key.removeprefix("label.")
        exact = "EXISTS (SELECT 1 FROM json_each(labels) WHERE json_each.key = ? AND json_each.value = ?)"
        return f"(instr(labels, ?) > 0 AND {exact})", (json.dumps({label: value})[1:-1], label, value)
    raise _refused(repr(word[:80]), "state= active= name= label.KEY= owner= id=")


def _refused(found: str, expected: str) -> UsageError:
    return UsageError("filter", expected=expected, found=found, cure='such as "state=RUNNING label.team=vision"')
