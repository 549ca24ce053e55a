"""Authentication of requests. All of it is in this module.

Tokens are required if OUTWAKE_OIDC_ISSUER or OUTWAKE_REQUIRE_TOKEN is set. Then a request must have one in
its Authorization header: an API token, or a token of the issuer, whose `sub` is the user. The API accepts no
cookie, so a page of another origin cannot use a user's browser, and no header that names a user. (The
dashboard has a cookie, and forms that cannot be forged: app/dashboard/page.py.)

Otherwise this is the development mode. Everybody is the operator `local`, so outsiders must not reach the
process:
1. The process listens on loopback only, unless OUTWAKE_DEV_IDENTITY=1 says that something else keeps
   strangers out (a compose network, an authenticating proxy).
2. A web page in the user's own browser can reach loopback. Such a page has another Origin. A page that gave
   our address its own name (DNS rebinding) has another Host. Both are refused. With OUTWAKE_DEV_IDENTITY the
   Host may also be an address, which cannot be rebound, or the host of OUTWAKE_PUBLIC_URL.
If a request has an API token, the token decides in this mode too. Any other token is taken for the user
`local`, and the answer's header Outwake-User says so.
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

DEVELOPER = "local"
"""The user that everybody is in development mode."""

SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}
TOKEN_LENGTH = 16_384
FOREVER = 2**40  # seconds since 1970; caps an issuer's `exp`, which may be any number
REMEMBERED = 10_000  # tokens of the issuer
API_TOKEN_STREAM = 3600.0  # seconds; a stream of an API token ends then, in case the token was revoked

# Only the word `Bearer` ignores case: a pattern that ignores it everywhere is slower.
_BEARER = re.compile(r"(?i:bearer) +([A-Za-z0-9._~+/-]+=*)")


@dataclass(frozen=True)
class Identity:
    """A user of the API. An operator sees all users' sessions and the outbox."""

    user_id: str
    operator: bool
    until: float = float("inf")
    """When the token must be shown again (monotonic clock). A stream ends then."""

    @property
    def scope(self) -> str | None:
        """The user whose sessions this user may see. None means all users."""
        return None if self.operator else self.user_id

    def sees(self, user_id: str | None) -> bool:
        """Whether this user may see the sessions of that one."""
        return self.operator or self.user_id == user_id


def check_operator(identity: Identity) -> None:
    """Raise Problem (forbidden) if this user may not see the outbox."""
    if not identity.operator:
        raise Problem("forbidden", "Only operators may see the outbox.")


class Authenticator:
    """Identifies users by their tokens."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings = settings
        self._tokens = Tokens(database)
        self._issuer = Issuer(settings) if settings.oidc_issuer else None
        # By the token's hash, with the time at which the keys that verified it were fetched. Verification is
        # expensive, so it is repeated only when the keys are renewed.
        self._verified: dict[bytes, tuple[Identity, float]] = {}

    async def close(self) -> None:
        if self._issuer:
            await self._issuer.close()

    async def identify(self, request: Request) -> Identity:
        """The request's identity. Raises Problem (unauthorized, forbidden, unavailable)."""
        if given := request.headers.getlist("authorization"):
            token = _bearer(given)
            if self._settings.token_required or is_token(token):
                return await self.by_token(token)
        elif self._settings.token_required:
            raise unauthorized("Send an Authorization header with a bearer token.", None)
        _check_developer(request, self._settings)
        if given:  # a placeholder of an example: the answer says whose it became
            request.state.made_of_token = DEVELOPER
        return Identity(DEVELOPER, operator=True)

    @property
    def issuer(self) -> Issuer | None:
        return self._issuer

    async def by_token(self, token: str) -> Identity:
        """The token's user. Raises Problem (unauthorized, unavailable)."""
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
    name = _name(request.headers.get("host", ""))
    fine = is_loopback(name)
    if settings.dev_identity and not fine:
        # An address cannot be rebound, only a name can.
        fine = _is_address(name) or name == _name(urlsplit(settings.public_url or "").netloc)
    if not name or not fine:
        raise Problem(
            "forbidden",
            "The Host header names another machine than this one."
            + (" OUTWAKE_PUBLIC_URL says by what name it is reached." if settings.dev_identity else ""),
        )
    if request.method not in SAFE_METHODS and not is_same_origin(request, settings):
        raise Problem("forbidden", "Pages of another origin may not do this.")


def is_same_origin(request: Request, settings: Settings) -> bool:
    """Whether the request's Origin is this server as a browser sees it. A request may have none."""
    origin, host = request.headers.get("origin"), request.headers.get("host", "")
    if origin is None:
        return True
    if settings.public_url and (
        origin == settings.public_url or urlsplit(settings.public_url).netloc == host
    ):
        return origin == settings.public_url
    return origin == f"{request.url.scheme}://{host}"


def check_host(settings: Settings) -> None:
    """Raise ConfigurationError if the development mode would be open to strangers."""
    if not settings.token_required and not settings.dev_identity and not is_loopback(settings.host):
        raise ConfigurationError(
            f"OUTWAKE_HOST: {settings.host} is not loopback, and there is no authentication: set "
            "OUTWAKE_OIDC_ISSUER or OUTWAKE_REQUIRE_TOKEN=1; "
            "OUTWAKE_DEV_IDENTITY=1 says that strangers are kept out by other means"
        )


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether `host` is localhost, a name below it, or a loopback address."""
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
