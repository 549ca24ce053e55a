"""The host of a repository: whether a clone may reach it, and what git needs for that. What else a host
offers, a pull request, is behind the seam in worker/repo/githost.py.

A user names the URL, so it must not lead into our network. The name is resolved here. Each of its addresses
must be public or in a network of OUTWAKE_GIT_ALLOW, as a webhook's must. git gets these addresses (https), so
that a changed answer of the DNS has no effect, and it follows no redirect.
"""

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from ipaddress import ip_address

from outwake.session.callback import Address, CallbackError, check_address, parse_networks
from outwake.session.names import InvalidNameError, clone_url
from outwake.settings import Settings
from outwake.worker.errors import PermanentError, TransientError

Resolve = Callable[[str], Awaitable[list[Address]]]

_RESOLVING = 15.0  # seconds
_HOST = re.compile(
    r"(?:(?P<scheme>https|ssh)://)?(?:[^@/]*@)?(?P<host>\[[^\]/]*\]|[^:/]+)(?::(?P<port>\d+)(?=/))?"
)


@dataclass(frozen=True)
class Limits:
    """What a clone may take: bytes of its packs and, apart from that, of its files; files; seconds."""

    size: int = 4 * 2**30
    files: int = 500_000
    seconds: float = 600.0


@dataclass(frozen=True)
class Remote:
    """The repository as a sandbox reaches it.

    url: accepted by `outwake/session/names.py`. resolved: `HOST:PORT:ADDRESS,…`, the only addresses that git
    may use; empty: those it finds itself.
    """

    url: str
    resolved: str = ""
    push: bool = False
    allow_file: bool = False
    limits: Limits = Limits()
    credentials: bytes | None = field(default=None, repr=False)

    @property
    def transports(self) -> str:
        """The transports that git may use for this repository."""
        return "https:ssh:file" if self.allow_file else "https:ssh"


async def remote_of(
    repo: str, settings: Settings, credentials: bytes | None, resolve: Resolve | None = None
) -> Remote:
    """The repository that a user named. Raises PermanentError if it may not be reached, or TransientError."""
    try:
        url = clone_url(repo, allow_file=settings.allow_file_repos)
    except InvalidNameError as error:
        raise PermanentError(str(error)) from error
    limits = Limits(settings.clone_bytes, settings.clone_files, settings.clone_timeout)
    resolved = "" if url.startswith("file:") else await _resolved(url, settings.git_allow, resolve)
    return Remote(url, resolved, settings.git_push, settings.allow_file_repos, limits, credentials)


async def _resolved(url: str, allow: str, resolve: Resolve | None) -> str:
    matched = _HOST.match(url)
    if matched is None:
        raise PermanentError("the repository's URL names no host")
    host = matched["host"].strip("[]")
    addresses = await (resolve or _resolve)(host)
    if not addresses:
        raise TransientError("the repository's host has no address")
    try:
        for address in addresses:
            check_address(address, parse_networks(allow))
    except CallbackError:  # it tells the address, which is not the user's to know
        raise PermanentError("the repository's host is not public (OUTWAKE_GIT_ALLOW)") from None
    if matched["scheme"] != "https":
        return ""
    shown = (f"[{address}]" if address.version == 6 else str(address) for address in addresses)
    return f"{matched['host']}:{matched['port'] or 443}:{','.join(shown)}"


async def _resolve(host: str) -> list[Address]:
    try:
        async with asyncio.timeout(_RESOLVING):
            found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise TransientError("the repository's host cannot be resolved") from error
    return [ip_address(entry[4][0]) for entry in found]
