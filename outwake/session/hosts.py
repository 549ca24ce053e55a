"""Which kind of Git host each name is: the setting OUTWAKE_GIT_HOSTS.

`HOST=github:API_BASE` is a host with GitHub's REST API, `HOST=plain` one to which git only pushes. What is
not named is plain, but for github.com.
"""

import re
from ipaddress import ip_address
from typing import NamedTuple
from urllib.parse import urlsplit

GITHUB_API = "https://api.github.com"

# As it stands in a repository's URL, with the port that it may name.
_HOST = re.compile(r"(?:[a-z0-9_](?:[a-z0-9._-]*[a-z0-9_])?|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")
_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)*")


class HostKind(NamedTuple):
    """kind: `github` or `plain`. api: the base of its API, without a slash at the end; None for plain.
    configured: an operator named the API, so it may be in a network that is not public.
    """

    kind: str
    api: str | None = None
    configured: bool = False


def parse_hosts(text: str) -> dict[str, HostKind]:
    """The hosts of a list that is separated by commas, and github.com. Raises ValueError."""
    hosts = {"github.com": HostKind("github", GITHUB_API)}
    for part in filter(None, map(str.strip, text.split(","))):
        host, _, told = part.partition("=")
        kind, _, api = told.partition(":")
        if not _HOST.fullmatch(host.lower()):
            raise ValueError("must be HOST=github:API_BASE or HOST=plain, separated by commas")
        if kind == "github" and _is_api(api):
            hosts[host.lower()] = HostKind("github", api.rstrip("/"), configured=True)
        elif told == "plain":
            hosts[host.lower()] = HostKind("plain")
        else:
            raise ValueError(f"{host} must be plain, or github: and an https:// URL (http:// on loopback)")
    return hosts


def _is_api(url: str) -> bool:
    """Whether a token may be sent there: by https, or on this machine."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return False
    if not host or "@" in parts.netloc or parts.query or parts.fragment:
        return False
    if not _PATH.fullmatch(parts.path.rstrip("/")):
        return False
    return parts.scheme == "https" or (parts.scheme == "http" and _is_loopback(host))


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
