"""Where webhooks may go, and the keys that sign them. The API checks a URL when a user gives it. The worker
checks it again at every delivery, together with the addresses of the name.

An address is allowed if it is public unicast, or in a network of OUTWAKE_WEBHOOK_ALLOW. An address that
embeds an IPv4 address (mapped, NAT64) counts as that address. 6to4 and Teredo addresses never pass, because
they hide where a packet ends.
"""

import base64
import binascii
import re
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from urllib.parse import urlsplit

URL_LENGTH = 1000

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_PRINTABLE = re.compile(r"[\x21-\x7e]+")
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?", re.IGNORECASE)
_NAT64 = IPv6Network("64:ff9b::/96")
_UNICAST = IPv6Network("2000::/3")
_HIDING = (IPv6Network("2002::/16"), IPv6Network("2001::/32"))
# Not public despite their numbers: a cloud's host agent (168.63.129.16), 6to4 relays.
_NOT_PUBLIC = (IPv4Network("168.63.129.16/32"), IPv4Network("192.88.99.0/24"))


class CallbackError(ValueError):
    """The URL or its address is not allowed; the message says why, in words for the user."""


def parse_networks(text: str) -> tuple[Network, ...]:
    """Networks or single addresses, separated by commas. Raises ValueError."""
    return tuple(ip_network(part.strip()) for part in text.split(",") if part.strip())


def parse_secrets(text: str) -> list[bytes]:
    """The keys of `whsec_…` secrets, separated by spaces. Raises ValueError without quoting any of them."""
    keys = []
    for secret in text.split():
        try:
            key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
        except binascii.Error:
            key = b""
        if not secret.startswith("whsec_") or not 24 <= len(key) <= 64:
            raise ValueError("must be whsec_ and base64 of 24 to 64 bytes")
        keys.append(key)
    if not keys:
        raise ValueError("is empty")
    return keys


def check_callback(url: str, allowed: tuple[Network, ...]) -> str:
    """Return `url` if a webhook may be sent to it, as far as this is known without the DNS.

    https, or http if any network is allowed. Raises CallbackError.
    """
    if len(url) > URL_LENGTH:
        raise CallbackError(f"the callback URL is longer than {URL_LENGTH} characters")
    if not _PRINTABLE.fullmatch(url) or "\\" in url:
        raise CallbackError("the callback URL may hold printable ASCII characters only")
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname or ""
    except ValueError:
        raise CallbackError("the callback URL is not a URL") from None
    if parts.scheme != "https" and not (parts.scheme == "http" and allowed):
        raise CallbackError("the callback URL must begin with https://")
    if "@" in parts.netloc:
        raise CallbackError("the callback URL must not contain a user name or password")
    if parts.fragment:
        raise CallbackError("the callback URL must not have a fragment")
    if port == 0:
        raise CallbackError("the callback URL's port is not between 1 and 65535")
    _check_host(host, allowed)
    return url


def _check_host(host: str, allowed: tuple[Network, ...]) -> None:
    try:
        address = ip_address(host)
    except ValueError:
        labels = host.removesuffix(".").split(".")
        if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
            raise CallbackError("the callback URL's host is not a name") from None
        # 2130706433, 0x7f.1, 0177.0.0.1: a resolver reads these as addresses.
        if re.fullmatch(r"[0-9]+|0x[0-9a-f]*", labels[-1], re.IGNORECASE):
            raise CallbackError("the callback URL's host is not a name") from None
        if (labels[-1].lower() == "localhost" or len(labels) == 1) and not allowed:
            raise CallbackError("the callback URL's host is not a public name") from None
    else:
        check_address(address, allowed)


def check_address(address: Address, allowed: tuple[Network, ...]) -> None:
    """Raise CallbackError unless a webhook may be sent to this address."""
    if not is_listed(address, allowed) and not _is_public(_embedded(address)):
        raise CallbackError(f"{address} is not a public address")


def is_listed(address: Address, allowed: tuple[Network, ...]) -> bool:
    """Whether the address is in one of these networks, so that plain http is allowed."""
    real = _embedded(address)
    return any(real in network for network in allowed if network.version == real.version)


def _embedded(address: Address) -> Address:
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def _is_public(address: Address) -> bool:
    if not address.is_global or address.is_multicast or address.is_reserved:
        return False
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _NOT_PUBLIC)
    return (
        address.scope_id is None
        and address in _UNICAST
        and not any(address in network for network in _HIDING)
    )
