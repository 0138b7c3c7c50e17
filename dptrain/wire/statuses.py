"""Errors on the wire, in one table: from DptrainError to a gRPC status with google.rpc details, and back to the same.

The details are ErrorInfo (the class, and the error's four parts), BadRequest for what the caller wrote, and RetryInfo
for what another attempt may cure.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import grpc
from google.protobuf import duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from dptrain import errors
from dptrain.errors import BusyError, DptrainError, RefusedError, UnreachableError

DOMAIN = "dptrain"
LONGEST_PART = 600
"""Characters of each part of an error that travel: all of them have to fit into a call's metadata."""
RETRY_SECONDS = 1

CODES: dict[type[DptrainError], grpc.StatusCode] = {
    errors.UsageError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.JobError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.DataError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ModelError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.LaunchError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ArithmeticMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    errors.NonFiniteError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.CheckpointError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.StorageError: grpc.StatusCode.UNAVAILABLE,
    errors.OutOfMemory: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.WorkerCrashed: grpc.StatusCode.INTERNAL,
    errors.WorkerLost: grpc.StatusCode.ABORTED,
    errors.CorruptionError: grpc.StatusCode.DATA_LOSS,
    errors.DisagreementError: grpc.StatusCode.DATA_LOSS,
    errors.ReplayError: grpc.StatusCode.DATA_LOSS,
    errors.PoisonError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.RefusedError: grpc.StatusCode.PERMISSION_DENIED,
    errors.UnreachableError: grpc.StatusCode.UNAVAILABLE,
    errors.BusyError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.NotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.RefusedTransition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.QuotaError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.ChangedError: grpc.StatusCode.ABORTED,
    errors.UploadError: grpc.StatusCode.INVALID_ARGUMENT,
}
"""A class that is not here has the code of the class that it is derived from."""

CALLERS = (errors.UsageError, errors.JobError, errors.DataError, errors.ModelError)
"""What the caller can mend in the request itself."""

_KINDS = {kind.__name__: kind for kind in CODES}

_BARE: dict[grpc.StatusCode, tuple[type[DptrainError], str]] = {
    grpc.StatusCode.UNAUTHENTICATED: (RefusedError, "give the token with --token-file or DPTRAIN_TOKEN"),
    grpc.StatusCode.PERMISSION_DENIED: (RefusedError, "use a token that is for it"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (BusyError, "try again later, or send less"),
    grpc.StatusCode.UNAVAILABLE: (UnreachableError, "see whether it runs, and its address, TLS and firewall"),
    grpc.StatusCode.DEADLINE_EXCEEDED: (UnreachableError, "see whether it is overloaded, or raise the deadline"),
    grpc.StatusCode.UNIMPLEMENTED: (errors.UsageError, "use the same version of dptrain on both sides"),
    grpc.StatusCode.INVALID_ARGUMENT: (errors.UsageError, "use the same version of dptrain on both sides"),
}
"""Statuses that come without our details: from gRPC itself, or from something that is no dptrain."""


_VALID = "that is valid now, {now} by this machine's clock"
_SET = "set the clocks of both machines, as by NTP; if they are right, make new certificates with dptrain certs init"
_DISTRUSTED = (
    ("is not yet valid", _VALID, "that is not valid yet", _SET),
    ("has expired", _VALID, "that has expired", _SET),
    (
        "unable to get local issuer certificate",
        "of the CA that was given",
        "of another",
        "give the ca.crt that was made with the server's certificate, by --tls-ca",
    ),
    (
        "Hostname Verification Check failed",
        "for this name",
        "for other names",
        "use a name that it is for, or make one with dptrain certs init --host NAME",
    ),
)
"""What gRPC says of a server's certificate that it doesn't trust; what was expected and found, and the cure."""


def code_of(error: DptrainError) -> grpc.StatusCode:
    """The status code of an error."""
    return next((CODES[kind] for kind in type(error).__mro__ if kind in CODES), grpc.StatusCode.UNKNOWN)


def to_status(error: DptrainError, code: grpc.StatusCode | None = None) -> grpc.Status:
    """What a server ends a call with: the table's code unless another is given."""
    parts = {name: _clipped(getattr(error, name)) for name in ("where", "expected", "found", "cure")}
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=DOMAIN, metadata=parts),
    ]
    if isinstance(error, CALLERS):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=parts["where"], description=f"expected {parts['expected']}, found {parts['found']}; {parts['cure']}"
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, BusyError):
        details.append(error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=RETRY_SECONDS)))
    status = status_pb2.Status(code=(code or code_of(error)).value[0], message=_clipped(str(error)))
    for detail in details:
        status.details.add().Pack(detail)
    made: grpc.Status = rpc_status.to_status(status)
    return made


def to_error(call: grpc.RpcError, address: object) -> DptrainError:
    """What a client raises for a call that failed: the server's own error if it sent one, else one that fits."""
    assert isinstance(call, grpc.Call)
    return _sent(call) or _bare(call, address)


@contextmanager
def told(address: object) -> Iterator[None]:
    """Calls to the server at ``address``, and reading from their streams: what fails is raised as DptrainError."""
    try:
        yield
    except grpc.RpcError as error:
        raise to_error(error, address) from error


def _sent(call: grpc.Call) -> DptrainError | None:
    try:
        status = rpc_status.from_call(call)
    except ValueError:  # details that contradict the status: not ours
        return None
    info = error_details_pb2.ErrorInfo()
    for detail in status.details if status is not None else ():
        if detail.Unpack(info) and info.domain == DOMAIN:
            kind = _KINDS.get(info.reason, DptrainError)
            parts = {name: info.metadata[name] for name in ("expected", "found", "cure")}
            return kind(info.metadata["where"], **parts)
    return None


def _bare(call: grpc.Call, address: object) -> DptrainError:
    code = call.code()
    kind, cure = _BARE.get(code, (DptrainError, "see the server's log"))
    said = _clipped(" ".join((call.details() or "").split()))
    if code is grpc.StatusCode.UNAVAILABLE:
        for mark, expected, found, mends in _DISTRUSTED:
            if mark in said:
                expected = expected.format(now=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC")
                return kind(f"server {address}", expected=f"a certificate {expected}", found=f"one {found}", cure=mends)
    return kind(f"server {address}", expected="an answer", found=f"{code.name}: {said}", cure=cure)


def _clipped(text: str) -> str:
    return text if len(text) <= LONGEST_PART else text[: LONGEST_PART - 3] + "..."
