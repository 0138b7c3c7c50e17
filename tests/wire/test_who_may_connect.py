"""Tokens, TLS and addresses, over real sockets."""

import logging
import socket
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from dptrain.errors import LaunchError, RefusedError, StorageError, UnreachableError, UsageError
from dptrain.wire import certificates, version
from dptrain.wire.address import parse
from dptrain.wire.channel import connect
from dptrain.wire.limits import Patience
from dptrain.wire.security import Calling, ClientTls, ServerTls, Serving
from dptrain.wire.server import Server
from dptrain.wire.statuses import told
from dptrain.wire.tokens import Role, TokenFile, fresh
from tests.wire.conftest import HERE
from tests.wire.echo import KINDS, NAME, Echo, call

SOON = Patience(connect_seconds=5.0)


@pytest.mark.parametrize("method", KINDS)
def test_the_right_token_is_let_in(guarded: Server, echo: Echo, tokens: dict[str, str], method: str) -> None:
    for role in ("submit", "admin"):
        with connect(guarded.address, Calling(tokens[role])) as channel:
            assert call(channel, method, b"x") in (b"x", b"xxx")
    assert set(echo.callers) == {"the submit", "the admin"}


@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize("shown", ["none", "wrong", "cut", "read", "worker", "revoked"])
def test_no_other_token_is(
    guarded: Server, echo: Echo, tokens: dict[str, str], tmp_path: Path, method: str, shown: str
) -> None:
    if shown == "revoked":
        TokenFile(tmp_path / "tokens.json").revoke("the submit")
    token = {"none": None, "wrong": fresh(), "cut": tokens["submit"][:-1], "revoked": tokens["submit"]} | tokens
    with connect(guarded.address, Calling(token[shown])) as channel:
        with pytest.raises(grpc.RpcError) as refused:
            call(channel, method)
        with pytest.raises(RefusedError), told(guarded.address):
            call(channel, method)
    code = grpc.StatusCode.PERMISSION_DENIED if shown in ("read", "worker") else grpc.StatusCode.UNAUTHENTICATED
    assert refused.value.code() is code
    assert echo.heard == []


@pytest.mark.parametrize("values", [("Basic x",), ("",), ("Bearer ",), ("Bearer {}", "Bearer {}"), ("bearer{}",)])
def test_a_token_shown_otherwise_is_none(guarded: Server, tokens: dict[str, str], values: tuple[str, ...]) -> None:
    metadata = [("authorization", value.format(tokens["admin"])) for value in values]
    with connect(guarded.address) as channel, pytest.raises(grpc.RpcError) as refused:
        call(channel, "Once", metadata=metadata)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("method", [f"/{NAME}/Nothing", "/dptrain.v1.Nothing/Nothing", "/x"])
def test_a_method_that_is_not_there_is_refused(guarded: Server, tokens: dict[str, str], method: str) -> None:
    for token, code in ((None, grpc.StatusCode.UNAUTHENTICATED), (tokens["admin"], grpc.StatusCode.UNIMPLEMENTED)):
        with connect(guarded.address, Calling(token)) as channel, pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary(method)(b"", timeout=20)
        assert refused.value.code() is code


def test_a_method_without_a_role_is_not_served(echo: Echo) -> None:
    with pytest.raises(ValueError, match="EchoService"):
        Server(HERE, [echo.service({"Once": Role.read})])


def test_health_reflection_and_version_want_a_token_too_of_any_role(guarded: Server, tokens: dict[str, str]) -> None:
    ask = [reflection_pb2.ServerReflectionRequest(list_services="")]
    with connect(guarded.address, Calling(tokens["worker"])) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
        watched = health.Watch(health_pb2.HealthCheckRequest())
        assert next(watched).status == health_pb2.HealthCheckResponse.SERVING
        guarded.serves(False)
        assert next(watched).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watched.cancel()
        answer = next(iter(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter(ask))))
        names = {service.name for service in answer.list_services_response.service}
        assert {NAME, "grpc.health.v1.Health", "dptrain.v1.VersionService"} <= names
        assert version.agree(channel, guarded.address, SOON)
    with connect(guarded.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.RpcError):
            health.Check(health_pb2.HealthCheckRequest())
        with pytest.raises(grpc.RpcError):
            list(health.Watch(health_pb2.HealthCheckRequest()))
        with pytest.raises(grpc.RpcError):
            list(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter(ask)))
        with pytest.raises(RefusedError):
            version.agree(channel, guarded.address, SOON)


def test_tokens_that_cant_be_read_let_nobody_in_aloud(
    guarded: Server, tokens: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tokens.json").unlink()
    with (
        caplog.at_level(logging.ERROR),
        connect(guarded.address, Calling(tokens["admin"])) as channel,
        pytest.raises(grpc.RpcError) as refused,
    ):
        call(channel, "Once")
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert "tokens.json" in caplog.text
    assert tokens["admin"] not in caplog.text


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "10.0.0.1:0", "trainer.lan:0"])
def test_another_address_needs_token_and_tls(address: str, certs: Path, tmp_path: Path, echo: Echo) -> None:
    keys, tls = TokenFile(tmp_path / "tokens.json"), ServerTls(certs / "server.crt", certs / "server.key")
    for serving, missing in ((Serving(), "token and no TLS"), (Serving(keys), "TLS"), (Serving(None, tls), "token")):
        with pytest.raises(RefusedError, match=f"no {missing};"):
            Server(parse(address), [echo.service()], serving=serving)
    client = ClientTls(certs / "ca.crt")
    for calling in (Calling(), Calling("dptrain_x"), Calling(None, client)):
        with pytest.raises(RefusedError, match="server"):
            connect(parse(address), calling)


def test_a_token_is_not_shown_in_what_is_printed() -> None:
    assert "dptrain_x" not in f"{Calling('dptrain_x')!r} {Calling('dptrain_x')}"


@pytest.mark.parametrize("method", KINDS)
def test_over_tls_on_all_interfaces(
    echo: Echo, certs: Path, tokens: dict[str, str], tmp_path: Path, method: str
) -> None:
    serving = Serving(TokenFile(tmp_path / "tokens.json"), ServerTls(certs / "server.crt", certs / "server.key"))
    with Server(parse("0.0.0.0:0"), [echo.service()], serving=serving) as server:
        here = parse(f"localhost:{server.address.port}")
        with connect(here, Calling(tokens["submit"], ClientTls(certs / "ca.crt"))) as channel:
            assert call(channel, method)
        with (
            connect(here, Calling(fresh(), ClientTls(certs / "ca.crt"))) as channel,
            pytest.raises(RefusedError),
            told(here),
        ):
            call(channel, method)


def test_a_server_of_another_ca_name_or_without_tls_is_not_talked_to(echo: Echo, certs: Path, tmp_path: Path) -> None:
    certificates.init(tmp_path / "other")
    tls = ServerTls(certs / "server.crt", certs / "server.key")
    with Server(HERE, [echo.service()], serving=Serving(tls=tls)) as server:
        for client, why in (
            (
                ClientTls(tmp_path / "other" / "ca.crt"),
                "of the CA that was given, found one of another; give the ca.crt",
            ),
            (ClientTls(certs / "ca.crt", server_name="trainer.lan"), "for this name, found one for other names"),
            (None, "UNAVAILABLE"),
        ):
            with connect(server.address, Calling("dptrain_x", client)) as channel:
                with pytest.raises(UnreachableError, match=why), told(server.address):
                    call(channel, "Once", timeout=5)
                # Whoever waits for the server hears it too.
                with pytest.raises(UnreachableError, match=why):
                    version.agree(channel, server.address, Patience(connect_seconds=0.5))
        with connect(server.address, Calling("dptrain_x", ClientTls(certs / "ca.crt"))) as channel:
            assert call(channel, "Once") == b"x"
    assert len(echo.heard) == 1


def test_mtls_wants_a_certificate_of_its_ca(echo: Echo, certs: Path, tmp_path: Path) -> None:
    certificates.init(tmp_path / "other")
    tls = ServerTls(certs / "server.crt", certs / "server.key", clients=certs / "ca.crt")
    with Server(HERE, [echo.service()], serving=Serving(tls=tls)) as server:
        ours = ClientTls(certs / "ca.crt", certs / "client.crt", certs / "client.key")
        with connect(server.address, Calling(None, ours)) as channel:
            assert call(channel, "Both") == b"x"
        other = ClientTls(certs / "ca.crt", tmp_path / "other" / "client.crt", tmp_path / "other" / "client.key")
        for client in (ClientTls(certs / "ca.crt"), other):
            with (
                connect(server.address, Calling(None, client)) as channel,
                pytest.raises(UnreachableError),
                told(server.address),
            ):
                call(channel, "Both", timeout=5)
    assert len(echo.heard) == 1


def test_certificates_are_not_overwritten_and_hosts_are_hosts(certs: Path, tmp_path: Path) -> None:
    before = (certs / "ca.key").read_bytes()
    with pytest.raises(StorageError, match=r"ca\.crt"):
        certificates.init(certs)
    assert (certs / "ca.key").read_bytes() == before
    assert {path.stat().st_mode & 0o777 for path in certs.iterdir()} == {0o600}
    with pytest.raises(UsageError):
        certificates.init(tmp_path / "new", ["a host"])
    assert not (tmp_path / "new").exists()


def test_files_that_are_no_pem_are_named(tmp_path: Path, certs: Path) -> None:
    (tmp_path / "x").write_text("x")
    with pytest.raises(UsageError, match="PRIVATE KEY"):
        Server(HERE, [], serving=Serving(tls=ServerTls(certs / "server.crt", tmp_path / "x")))
    with pytest.raises(StorageError, match="nowhere"):
        connect(HERE.at(1), Calling(None, ClientTls(tmp_path / "nowhere")))


def test_two_servers_on_one_port_fail_aloud(echo: Echo) -> None:
    with Server(HERE, [echo.service()]) as first:
        with pytest.raises(LaunchError, match=str(first.address.port)):
            Server(first.address, [Echo().service()])
        with connect(first.address) as channel:
            assert call(channel, "Once") == b"x"


def test_two_servers_on_one_path_fail_aloud_and_a_dead_ones_is_taken(echo: Echo, tmp_path: Path) -> None:
    address = parse(f"unix:{tmp_path}/dp.sock")
    with Server(address, [echo.service()]) as first:
        assert (tmp_path / "dp.sock").stat().st_mode & 0o777 == 0o600
        with pytest.raises(LaunchError, match=r"dp\.sock"):
            Server(address, [Echo().service()])
        with connect(first.address) as channel:
            assert call(channel, "Both") == b"x"
    assert list(tmp_path.iterdir()) == []
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dp.sock"))
    with Server(address, [echo.service()]) as second, connect(second.address) as channel:
        assert call(channel, "Once") == b"x"
    (tmp_path / "dp.sock").write_text("a file of somebody's")
    with pytest.raises(LaunchError, match="another file"):
        Server(address, [echo.service()])
    assert (tmp_path / "dp.sock").read_text() == "a file of somebody's"


def test_a_server_that_is_not_there_is_said_to_be() -> None:
    with Server(HERE, []) as server:
        address = server.address
    with connect(address) as channel, pytest.raises(UnreachableError, match=str(address.port)):
        version.agree(channel, address, Patience(connect_seconds=0.5))
