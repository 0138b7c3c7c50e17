import pytest

from dptrain.errors import UsageError
from dptrain.wire.address import parse


@pytest.mark.parametrize(
    ("text", "loopback"),
    [
        ("unix:/run/dp.sock", True),
        ("unix:relative.sock", True),
        ("localhost:7070", True),
        ("127.0.0.1:0", True),
        ("127.9.9.9:1", True),
        ("[::1]:7070", True),
        ("[::ffff:127.0.0.1]:7070", True),
        ("[::ffff:10.0.0.1]:7070", False),
        ("0.0.0.0:7070", False),
        ("[::]:7070", False),
        ("10.0.0.5:7070", False),
        ("trainer.lan:7070", False),
        ("localhost.evil.example:7070", False),
        ("2130706433:7070", False),
    ],
)
def test_what_stays_on_the_machine(text: str, loopback: bool) -> None:
    assert parse(text).loopback is loopback
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host",
        ":7070",
        "host:",
        "host:x",
        "host:65536",
        "host:-1",
        "::1:7070",
        "[::1]",
        "[x]:1",
        "unix:",
        "a b:1",
        "unix:" + "x" * 108,
        "unix:a\x00b",
        "dns:///host:1",
        "host:٣",
        "h/p:1",
        "unix-abstract:x",
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError):
        parse(text)


def test_three_slashes_are_a_unix_address_too() -> None:
    assert parse("unix:///run/dp.sock") == parse("unix:/run/dp.sock")
