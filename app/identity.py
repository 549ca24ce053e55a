"""Who asks. The one seam for authentication; today there is only the development mode.

In development mode everybody is the operator `local`, so it must not be reachable from outside:
1. The process refuses to listen on anything but loopback, unless SENDOFF_DEV_IDENTITY=1 says that
   somebody else keeps strangers out (a compose network, a proxy that authenticates).
2. Loopback alone does not keep out a web page in the user's own browser. Such a page has another
   Origin, and one that got our address under its own name (DNS rebinding) another Host: both are refused.
"""

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.requests import Request

from app.context import context
from app.problems import Problem
from outbox.errors import ConfigurationError
from outbox.settings import Settings

SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}


@dataclass(frozen=True)
class Identity:
    """A user of the API. An operator sees everybody's sessions and the outbox."""

    user_id: str
    operator: bool

    @property
    def scope(self) -> str | None:
        """The user whose sessions may be seen; None: everybody's."""
        return None if self.operator else self.user_id


def identify(request: Request) -> Identity:
    """The request's identity. Raises Problem (forbidden)."""
    settings = context(request).settings
    host = request.headers.get("host", "")
    if not settings.dev_identity and not is_loopback(_name(host)):
        raise Problem("forbidden", "The Host header names another machine than this one.")
    origin = request.headers.get("origin")
    if origin is not None and request.method not in SAFE_METHODS and urlsplit(origin).netloc != host:
        raise Problem("forbidden", "Pages of another origin may not do this.")
    return Identity("local", operator=True)


def check_host(settings: Settings) -> None:
    """Raise ConfigurationError where the development mode would be open to strangers."""
    if not settings.dev_identity and not is_loopback(settings.host):
        raise ConfigurationError(
            f"SENDOFF_HOST: {settings.host} is not loopback, and there is no authentication yet; "
            "SENDOFF_DEV_IDENTITY=1 says that strangers are kept out by other means"
        )


def is_loopback(host: str) -> bool:
    """Whether it is localhost, a name below it, or a loopback address."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
