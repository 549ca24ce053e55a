"""Which URLs and addresses a webhook may go to."""

from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outwake.session.callback import (
    CallbackError,
    check_address,
    check_callback,
    is_listed,
    parse_networks,
    parse_secrets,
)


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example/",
        "https://hooks.example:8443/a/b?c=d&e=%20",
        "https://hooks.example.",
        "https://xn--bcher-kva.example/",
        "https://93.184.215.14/",
        "https://[2606:2800:21f:cb07:6820:80da:af6b:8b2c]/",
        "HTTPS://Hooks.Example/",
    ],
)
def test_public_urls(url: str) -> None:
    assert check_callback(url, ()) == url


@pytest.mark.parametrize(
    "url",
    [
        "",
        "hooks.example",
        "//hooks.example/",
        "https://",
        "https:///path",
        "https://hooks.example:0/",
        "https://hooks.example:65536/",
        "https://hooks.example:port/",
        "https://hooks..example/",
        "https://-hooks.example/",
        "https://hooks.example/#fragment",
        "https://bücher.example/",
        "https://hooks.example/ a",
        "https://[hooks.example/",
        "https://[::1/",
        "https://hooks.1/",
        "https://hooks.example.0x7f/",
        "https://a@hooks.example/",
        "https://" + "a" * 1000 + ".example/",
    ],
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(CallbackError):
        check_callback(url, ())


def test_what_is_allowed_by_name() -> None:
    allowed = parse_networks("10.1.0.0/16, 127.0.0.1,fd00::/8")
    for url in ("http://10.1.2.3/", "https://127.0.0.1:9000/", "http://[fd12::1]/", "http://localhost/"):
        check_callback(url, allowed)
    for url in ("http://10.2.0.1/", "https://127.0.0.2/", "ftp://10.1.2.3/"):
        with pytest.raises(CallbackError):
            check_callback(url, allowed)
    assert is_listed(ip_address("::ffff:10.1.2.3"), allowed)
    assert is_listed(ip_address("64:ff9b::10.1.2.3"), allowed)
    assert not is_listed(ip_address("93.184.215.14"), allowed)


@settings(deadline=None)
@given(st.ip_addresses(v=4))
def test_an_address_is_judged_alike_in_every_disguise(address: object) -> None:
    """Mapped and NAT64 count as the IPv4 address; 6to4 never passes."""
    number = int(ip_address(str(address)))

    def passes(text: str) -> bool:
        try:
            check_address(ip_address(text), ())
        except CallbackError:
            return False
        return True

    plain = passes(str(address))
    assert passes(f"::ffff:{address}") == plain
    assert passes(f"64:ff9b::{number >> 16:x}:{number & 0xFFFF:x}") == plain
    assert not passes(f"2002:{number >> 16:x}:{number & 0xFFFF:x}::")
    assert not passes(f"::{number >> 16:x}:{number & 0xFFFF:x}")
    if not ip_address(str(address)).is_global:
        assert not plain


@pytest.mark.parametrize("text", ["10.0.0.1/8", "localhost", "10.0.0.0/33", "1,2,x"])
def test_networks_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_networks(text)


@pytest.mark.parametrize("text", ["", "secret", "whsec_!", "whsec_c2hvcnQ=", "whsec_" + "A" * 200])
def test_secrets_that_are_none_are_not_repeated(text: str) -> None:
    with pytest.raises(ValueError, match=r"whsec_ and base64|empty") as raised:
        parse_secrets(text)
    assert not text or text not in str(raised.value)
