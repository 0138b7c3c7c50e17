"""Mutated calls to a live server, and what is made of its answers."""

import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from dptrain.wire.channel import connect
from tests.fuzz.target import Live, Method
from tests.wire.mutation import mutated

CALL_SECONDS = 20.0
STREAM_SECONDS = 0.1
"""An answer that streams need not end; it is left after that."""
MOST_ANSWERS = 50
PAUSE_SECONDS = 0.1

BUGS = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS}
"""What no message, whatever it says, may bring a server to answer."""
GONE = {grpc.StatusCode.UNAVAILABLE}


@dataclass
class Tally:
    """``reached`` counts a call's first message alone, if it parses: what a method reads after it is its own affair."""

    messages: int = 0
    parsed: int = 0
    reached: int = 0
    answers: Counter[tuple[str, str]] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        self.messages += other.messages
        self.parsed += other.parsed
        self.reached += other.reached
        self.answers += other.answers
        self.bad += other.bad

    def table(self) -> str:
        lines = [f"{count:8} {method} {code}" for (method, code), count in sorted(self.answers.items())]
        share = self.reached / max(1, self.messages)
        lines.append(f"{self.messages} mutations, {self.parsed} parsed, {self.reached} reached a method ({share:.0%})")
        return "\n".join([*lines, *self.bad])


def parses(method: Method, data: bytes) -> bool:
    """Whether a server of the same protos can read it."""
    try:
        method.request.FromString(data)
    except (DecodeError, RecursionError):
        return False
    return True


def attack(live: Live, seed: int, calls: int) -> Tally:
    """Make ``calls`` calls, one after the other over one channel; the same seed makes the same ones."""
    rng, tally = random.Random(seed), Tally()
    with connect(live.address, live.calling) as channel:
        for number in range(calls):
            if live.over():
                break
            method = rng.choice(live.methods)
            count = rng.choice((1, 1, 1, 2, 4)) if method.asks else 1
            sent = [mutated(rng, rng.choice(method.examples), method.examples) for _ in range(count)]
            fit = [parses(method, data) for data in sent]
            code, said = answer(channel, method, sent)
            if code in GONE and _ends(live):
                break
            tally.messages += count
            tally.parsed += sum(fit)
            tally.answers[method.path.rpartition("/")[2], code.name] += 1
            tally.reached += fit[0] and code is not grpc.StatusCode.RESOURCE_EXHAUSTED
            if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
                # Mostly there were too many calls a second, and the next ones would not be read either.
                time.sleep(PAUSE_SECONDS)
            if code in GONE or code in BUGS:
                tally.bad.append(f"seed {seed} call {number}: {method.path} {code.name} {said}: {sent[0][:200]!r}")
                break
    return tally


def _ends(live: Live) -> bool:
    """Whether a server that takes no more calls does so because its work is done."""
    until = time.monotonic() + CALL_SECONDS
    while not live.over():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def answer(channel: grpc.Channel, method: Method, sent: list[bytes]) -> tuple[grpc.StatusCode, str]:
    """How the server ended the call, or OK where it still goes on when it is left."""
    kind = f"{'stream' if method.asks else 'unary'}_{'stream' if method.answers else 'unary'}"
    made = getattr(channel, kind)(method.path)
    try:
        if method.answers:
            _read(made(_messages(method, sent), timeout=STREAM_SECONDS))
        else:
            made(_messages(method, sent), timeout=CALL_SECONDS)
    except grpc.RpcError as error:
        if method.answers and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return grpc.StatusCode.OK, ""
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


def _messages(method: Method, sent: list[bytes]) -> bytes | Iterator[bytes]:
    return iter(sent) if method.asks else sent[0]


def _read(answers: Any) -> None:
    for number, _ in enumerate(answers):
        if number == MOST_ANSWERS:
            answers.cancel()
            return
