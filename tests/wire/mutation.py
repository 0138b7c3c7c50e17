"""Seeded mutations of protobuf messages, of whatever service: some as bytes, most as fields, so that they parse."""

import random
from collections.abc import Callable
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

INTEGERS = (0, 1, 2, 3, 7, 127, 128, 255, 1 << 16, (1 << 20) - 1, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
INTEGERS_64 = (*INTEGERS, 1 << 32, 1 << 40, (1 << 53) + 1, (1 << 63) - 1)
FLOATS = (0.0, -0.0, 1.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e-320, 1.7e308, 0.1)
STRINGS = (
    "",
    "x",
    "\0",
    "..",
    "../../etc/passwd",
    "a\nb",
    "'; drop",
    "ü" * 40,
    "x" * 5000,
    "%s%n",
    "${HOME}",
    "-1",
    "{}",
)

_KIND = FieldDescriptor
_NAMES = {number: name for name, number in vars(FieldDescriptor).items() if name.startswith("TYPE_")}


def mutated(rng: random.Random, message: Message, others: tuple[Message, ...] = ()) -> bytes:
    """What is sent instead of ``message``; ``others`` are of the same type, and lend their fields."""
    if rng.random() < 0.3:
        data = message.SerializeToString()
        other = rng.choice(others).SerializeToString() if others else data
        for _ in range(rng.choice((1, 1, 2, 5))):
            data = rng.choice(_ON_BYTES)(rng, data, other)
        return data
    copy = type(message)()
    copy.CopyFrom(message)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
        change(rng, copy, others)
    data = copy.SerializeToString()
    if rng.random() < 0.05:
        data += unknown(rng)
    return data


def change(rng: random.Random, message: Message, others: tuple[Message, ...] = ()) -> None:
    """Set, clear, lengthen or replace one field somewhere in ``message``, in place."""
    fields = message.DESCRIPTOR.fields
    if not fields:
        return
    field = rng.choice(fields)
    if rng.random() < 0.1:
        message.ClearField(field.name)
        return
    lenders = tuple(other for other in others if type(other) is type(message))
    if lenders and rng.random() < 0.3:
        _lend(rng.choice(lenders), message, field)
        return
    if field.is_repeated:
        _change_repeated(rng, message, field)
    elif field.type == _KIND.TYPE_MESSAGE:
        inner = getattr(message, field.name)
        inner.SetInParent()
        lent = tuple(getattr(other, field.name) for other in lenders)
        change(rng, inner, lent)
    else:
        setattr(message, field.name, value(rng, field, getattr(message, field.name)))


def _lend(lender: Message, message: Message, field: FieldDescriptor) -> None:
    message.ClearField(field.name)
    if field.is_repeated or field.type == _KIND.TYPE_MESSAGE:
        if field.is_repeated or lender.HasField(field.name):
            part = type(message)()
            part.CopyFrom(lender)
            for other in lender.DESCRIPTOR.fields:
                if other is not field and other.name != field.name:
                    part.ClearField(other.name)
            message.MergeFrom(part)
    else:
        setattr(message, field.name, getattr(lender, field.name))


def _change_repeated(rng: random.Random, message: Message, field: FieldDescriptor) -> None:
    held = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        held.clear()
        return
    if held and rng.random() < 0.5:
        del held[rng.randrange(len(held))]
    for _ in range(rng.choice((0, 1, 3, 100))):
        if field.type == _KIND.TYPE_MESSAGE:
            change(rng, held.add())
        else:
            held.append(value(rng, field, None))


def value(rng: random.Random, field: FieldDescriptor, now: Any) -> Any:
    """Something that fits the field's type, and seldom its meaning; ``now`` is what it holds."""
    kind = field.type
    if kind in (_KIND.TYPE_BYTES, _KIND.TYPE_STRING):
        if kind == _KIND.TYPE_STRING:
            return rng.choice(STRINGS)
        size = rng.choice((0, 1, 3, 4, 7, 8, 64, 4096, len(now or b"") + 4, max(0, len(now or b"") - 4)))
        kept = (now or b"")[:size]
        return kept + rng.randbytes(min(size, 1 << 20) - len(kept))
    if kind in (_KIND.TYPE_FLOAT, _KIND.TYPE_DOUBLE):
        return rng.choice(FLOATS) if kind == _KIND.TYPE_DOUBLE else rng.choice(FLOATS[:8])
    if kind == _KIND.TYPE_BOOL:
        return rng.random() < 0.5
    if kind == _KIND.TYPE_ENUM:
        return rng.choice((0, 1, 2, 3, 4, 99, (1 << 31) - 1))
    if now is not None and rng.random() < 0.4:
        return min(max(0, now + rng.choice((-1, 1, 2, 4))), (1 << 31) - 1 if "32" in _NAMES[kind] else (1 << 63) - 1)
    if kind in (_KIND.TYPE_INT32, _KIND.TYPE_SINT32, _KIND.TYPE_SFIXED32):
        return rng.choice((*INTEGERS[:12], -1, -(1 << 31)))
    if kind in (_KIND.TYPE_UINT32, _KIND.TYPE_FIXED32):
        return rng.choice(INTEGERS)
    if kind in (_KIND.TYPE_UINT64, _KIND.TYPE_FIXED64):
        return rng.choice((*INTEGERS_64, (1 << 64) - 1, rng.getrandbits(64)))
    return rng.choice((*INTEGERS_64, -1, -(1 << 63)))


def unknown(rng: random.Random) -> bytes:
    """A field that no message of ours has."""
    return b"\xfa\xff\x03" + bytes([rng.randrange(40)]) + rng.randbytes(40)


def _flip(rng: random.Random, data: bytes, other: bytes) -> bytes:
    if not data:
        return b"\x80"
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def _cut(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _drop(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.randrange(1, 9) :]


def _insert(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:]


def _double(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data + data[rng.randrange(len(data) + 1) :]


def _splice(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def _lengthen(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """A length, or a number, that goes far beyond the message."""
    at = rng.randrange(len(data) + 1)
    return data[:at] + b"\xff\xff\xff\xff\x0f" + data[at + 1 :]


def _deepen(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Groups within groups: as deep as a parser may be willing to go."""
    return data + b"\x0b" * rng.choice((10, 99, 101, 5000))


_ON_BYTES: tuple[Callable[[random.Random, bytes, bytes], bytes], ...] = (
    _flip,
    _flip,
    _cut,
    _drop,
    _insert,
    _double,
    _splice,
    _lengthen,
    _deepen,
)
