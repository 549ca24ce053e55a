"""Who asks: the one seam for authentication.

Where tokens are required (OUTWAKE_OIDC_ISSUER or OUTWAKE_REQUIRE_TOKEN is set) a request must bring one in
its Authorization header: an API token, or a token of the issuer, whose `sub` is the user. Nothing else
counts: no cookie, so that no page of another origin can use a user's browser, and no header that names a
user. (The dashboard's pages have a cookie and forms that cannot be forged: app/dashboard/page.py.)

Elsewhere is the development mode: everybody is the operator `local`, so it must not be reachable from
outside:
1. The process refuses to listen on anything but loopback, unless OUTWAKE_DEV_IDENTITY=1 says that
   somebody else keeps strangers out (a compose network, a proxy that authenticates).
2. Loopback alone does not keep out a web page in the user's own browser. Such a page has another
   Origin, and one that got our address under its own name (DNS rebinding) another Host: both are refused.
A request that brings a token is judged by it, here too.
"""

import ipaddress
import re
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.requests import Request

from outwake.app.api.problems import Problem
from outwake.app.auth.oidc import LEEWAY, Issuer, Rejected, has_role
from outwake.app.auth.tokens import Tokens
from outwake.app.database import Database
from outwake.errors import ConfigurationError
from outwake.session.token import check_user, hash_of, is_token
from outwake.settings import Settings

SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}
TOKEN_LENGTH = 16_384
FOREVER = 2**40  # seconds since 1970; an issuer may write any number
REMEMBERED = 10_000  # tokens of the issuer
API_TOKEN_STREAM = 3600.0  # seconds until a stream must show again that its API token is not revoked

# The case of the token's own characters is not ignored: 1 us, and not 7.
_BEARER = re.compile(r"(?i:bearer) +([A-Za-z0-9._~+/-]+=*)")


@dataclass(frozen=True)
class Identity:
    """A user of the API. An operator sees everybody's sessions and the outbox."""

    user_id: str
    operator: bool
    until: float = float("inf")
    """When it has to be shown again, by the monotonic clock: a stream ends then."""

    @property
    def scope(self) -> str | None:
        """The user whose sessions may be seen; None: everybody's."""
        return None if self.operator else self.user_id


class Authenticator:
    """Knows users by their tokens."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings = settings
        self._tokens = Tokens(database)
        self._issuer = Issuer(settings) if settings.oidc_issuer else None
        # By hash, with when the keys were fetched that verified it: renewed keys verify it anew. To verify
        # one takes 190 us, as much as all else that the API does with a request but the query.
        self._verified: dict[bytes, tuple[Identity, float]] = {}

    async def close(self) -> None:
        if self._issuer:
            await self._issuer.close()

    async def identify(self, request: Request) -> Identity:
        """The request's identity. Raises Problem (unauthorized, forbidden, unavailable)."""
        if given := request.headers.getlist("authorization"):
            return await self.by_token(_bearer(given))
        if self._settings.token_required:
            raise unauthorized("Send an Authorization header with a bearer token.", None)
        _check_developer(request, self._settings)
        return Identity("local", operator=True)

    @property
    def issuer(self) -> Issuer | None:
        return self._issuer

    async def by_token(self, token: str) -> Identity:
        """Whom the token stands for. Raises Problem (unauthorized, unavailable)."""
        if is_token(token):
            owner = await self._tokens.owner(token)
            if owner is None:
                raise unauthorized("The API token is unknown, expired or revoked.")
            return Identity(*owner, time.monotonic() + API_TOKEN_STREAM)
        if self._issuer is None:
            raise unauthorized("The token is no API token, and no issuer is configured.")
        key = hash_of(token)
        known = self._verified.get(key)
        if known and known[1] == await self._issuer.renewed() and time.monotonic() < known[0].until:
            return known[0]
        self._verified.pop(key, None)
        identity = await self._verify(self._issuer, token)
        if len(self._verified) >= REMEMBERED:  # the first is the oldest
            del self._verified[next(iter(self._verified))]
        self._verified[key] = (identity, self._issuer.fetched_at)
        return identity

    async def _verify(self, issuer: Issuer, token: str) -> Identity:
        try:
            claims = await issuer.verify(token)
            user_id = check_user(claims["sub"])
        except Rejected as error:
            raise unauthorized(str(error)) from None
        except ValueError:
            raise unauthorized("The token's sub cannot be a user's name.") from None
        settings = self._settings
        operator = has_role(claims, settings.oidc_role_claim, settings.oidc_operator_role)
        left = min(int(claims["exp"]), FOREVER) + LEEWAY - time.time()
        return Identity(user_id, operator, time.monotonic() + left)


def unauthorized(detail: str, error: str | None = "invalid_token") -> Problem:
    """401 with the challenge of RFC 6750."""
    challenge = 'Bearer realm="outwake"'
    if error:
        challenge += f', error="{error}", error_description="{detail}"'
    return Problem("unauthorized", detail, headers={"WWW-Authenticate": challenge})


def _bearer(given: list[str]) -> str:
    if len(given) > 1:
        raise unauthorized("Send one Authorization header.", "invalid_request")
    found = _BEARER.fullmatch(given[0])
    if found is None or len(given[0]) > TOKEN_LENGTH:
        raise unauthorized("The Authorization header holds no bearer token.", "invalid_request")
    return found[1]


def _check_developer(request: Request, settings: Settings) -> None:
    host = request.headers.get("host", "")
    if not settings.dev_identity and not is_loopback(_name(host)):
        raise Problem("forbidden", "The Host header names another machine than this one.")
    origin = request.headers.get("origin")
    if origin is not None and request.method not in SAFE_METHODS and origin.partition("://")[2] != host:
        raise Problem("forbidden", "Pages of another origin may not do this.")


def check_host(settings: Settings) -> None:
    """Raise ConfigurationError where the development mode would be open to strangers."""
    if not settings.token_required and not settings.dev_identity and not is_loopback(settings.host):
        raise ConfigurationError(
            f"OUTWAKE_HOST: {settings.host} is not loopback, and there is no authentication: set "
            "OUTWAKE_OIDC_ISSUER or OUTWAKE_REQUIRE_TOKEN=1; "
            "OUTWAKE_DEV_IDENTITY=1 says that strangers are kept out by other means"
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
