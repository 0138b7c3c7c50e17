"""``dptrain certs init``: a CA of one's own, and certificates of it for a server and a client."""

import ipaddress
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from dptrain.errors import StorageError, UsageError

LOCAL = ("localhost", "127.0.0.1", "::1")
"""Names that every server's certificate is for."""
DAYS = 825
NAMES = ("ca", "server", "client")

_EARLIER = timedelta(days=1)
"""Before now, from when certificates hold: clocks of a cluster's machines may differ by hours."""


def init(folder: Path, hosts: Sequence[str] = (), days: int = DAYS) -> list[Path]:
    """Write NAME.crt and NAME.key (0600) for a CA, a server at ``hosts`` and a client; return the files.

    Raises StorageError where one of the files is there already, UsageError for a host that is none.
    """
    files = [folder / f"{name}.{kind}" for name in NAMES for kind in ("crt", "key")]
    names = x509.SubjectAlternativeName([_general(host) for host in dict.fromkeys((*LOCAL, *hosts))])
    ca_key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    issuer = _name("dptrain CA")
    until = now + timedelta(days=days)
    ca = (
        _builder(issuer, issuer, ca_key, now, until)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    pems = [_certificate_pem(ca), _key_pem(ca_key)]
    for name, purpose in (("server", ExtendedKeyUsageOID.SERVER_AUTH), ("client", ExtendedKeyUsageOID.CLIENT_AUTH)):
        key = ec.generate_private_key(ec.SECP256R1())
        builder = (
            _builder(_name(f"dptrain {name}"), issuer, key, now, until)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        )
        if name == "server":
            builder = builder.add_extension(names, critical=False)
        pems += [_certificate_pem(builder.sign(ca_key, hashes.SHA256())), _key_pem(key)]
    _write(folder, dict(zip(files, pems, strict=True)))
    return files


def hosts(file: Path) -> list[str]:
    """The names and IP addresses that a PEM certificate is for; "*.NAME" stands for one more part before NAME.

    Raises StorageError, or UsageError where the file holds no certificate.
    """
    try:
        certificate = x509.load_pem_x509_certificate(file.read_bytes())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except OSError as error:
        raise StorageError(
            f"{file}", expected="a PEM file", found=error.strerror or str(error), cure="dptrain certs init makes them"
        ) from None
    except ValueError as error:
        raise UsageError(
            f"{file}", expected="a certificate", found=str(error)[:80], cure="dptrain certs init makes them"
        ) from None
    except x509.ExtensionNotFound:
        return []
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]


def _write(folder: Path, contents: dict[Path, bytes]) -> None:
    there = [path for path in contents if path.exists()]
    if there:
        raise StorageError(
            f"{folder}",
            expected="no certificates yet",
            found=", ".join(path.name for path in there),
            cure="choose another folder; who trusts these would not trust new ones",
        )
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path, content in contents.items():
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(content)
    except OSError as error:
        raise StorageError(
            f"{folder}",
            expected="room and leave to write there",
            found=error.strerror or str(error),
            cure="choose another folder",
        ) from None


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    now: datetime,
    until: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not host or not host.isascii() or not all(c.isalnum() or c in "-._*" for c in host):
        raise UsageError("--host", expected="a host's name or IP address", found=repr(host), cure="such as trainer.lan")
    return x509.DNSName(host)


def _certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
