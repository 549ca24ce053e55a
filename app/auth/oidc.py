"""Verification of an OpenID Connect issuer's tokens with its published keys.

1. The token's header only selects a key. Its algorithm must be one of ALGORITHMS, and a fetched key must
   allow it. All are asymmetric: with HS256 anybody could sign with the public key. URLs and keys in the
   header (`jku`, `jwk`, `x5u`) are ignored.
2. Keys come from discovery. One task fetches them for all requests that wait. After FRESH seconds it renews
   them, and the old keys serve meanwhile. After STALE seconds they expire, so a withdrawn key does too.
3. An unknown `kid` triggers a fetch, because the issuer may have rotated its keys. There is at most one
   each PAUSE, so that a flood of invented `kid`s does not flood the issuer.
4. The signature is checked, then `iss`, `aud`, `exp`, `nbf` and `iat`. LEEWAY allows for clock differences.

app/auth/identity.py caches a verified token for as long as the same keys count; `renewed` identifies them.
"""

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx
import jwt
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from outwake.app.api.problems import unavailable
from outwake.errors import ConfigurationError
from outwake.settings import Settings
from outwake.telemetry.log import get_logger

# The algorithms of each kind of key: (kty, crv) -> algorithms.
_BY_KEY = {
    ("RSA", None): ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    ("EC", "P-256"): ("ES256",),
    ("EC", "P-384"): ("ES384",),
    ("EC", "P-521"): ("ES512",),
    ("OKP", "Ed25519"): ("EdDSA",),
}
ALGORITHMS = frozenset(name for names in _BY_KEY.values() for name in names)
MIN_RSA_BITS = 2048

LEEWAY = 30  # seconds
FRESH = 600.0  # seconds
STALE = 3600.0  # seconds
PAUSE = 10.0  # least seconds between fetches for an unknown kid
FAILURE_PAUSE = 1.0  # seconds after a failed fetch, if there are no valid keys
FETCH_TIMEOUT = 5.0  # seconds
MAX_DOCUMENT = 1_000_000  # bytes
MAX_KEYS = 100

IssuerAnswer = dict[str, Any]

log = get_logger("outwake.app.auth.oidc")


class Rejected(Exception):
    """The token is not accepted. The message tells the client why."""


class Unusable(Exception):
    """The issuer's answer cannot be used."""


@dataclass(frozen=True)
class Key:
    """A public key of the issuer, and the algorithms it allows."""

    kid: str | None
    algorithms: frozenset[str]
    key: Any


def check_issuer(settings: Settings) -> None:
    """Raise ConfigurationError if OUTWAKE_OIDC_ISSUER is set but is not an issuer's URL."""
    if not settings.oidc_issuer:
        return
    try:
        url = httpx.URL(settings.oidc_issuer)
    except httpx.InvalidURL:
        url = httpx.URL()
    if url.scheme not in ("https", "http") or not url.host or url.query or url.fragment:
        raise ConfigurationError(f"OUTWAKE_OIDC_ISSUER: {settings.oidc_issuer} is not an issuer's URL")


class Issuer:
    """Verifies tokens of the issuer that the settings name."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        assert settings.oidc_issuer
        self._issuer = settings.oidc_issuer
        self._audience = settings.oidc_audience
        self._clock = clock
        self._secure = self._issuer.startswith("https://")
        if not self._secure:
            log.warning("issuer_by_http", issuer=self._issuer, warning="its keys can be forged on the way")
        self._client = httpx.AsyncClient(timeout=FETCH_TIMEOUT)  # it follows no redirects
        self._keys: list[Key] = []
        self.fetched_at = self._tried_at = float("-inf")
        self._fetching: asyncio.Task[None] | None = None

    async def close(self) -> None:
        if self._fetching:
            self._fetching.cancel()
            with suppress(asyncio.CancelledError):
                await self._fetching
        await self._client.aclose()

    async def verify(self, token: str) -> Mapping[str, Any]:
        """The claims. Raises Rejected, or Problem (unavailable) if the issuer's keys cannot be fetched."""
        try:
            header = jwt.get_unverified_header(token)
        except (jwt.PyJWTError, ValueError, RecursionError):
            raise Rejected("The token is not a signed JWT that can be read.") from None
        algorithm, kid = header.get("alg"), header.get("kid")
        if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
            raise Rejected("The token's algorithm is not accepted.")
        if kid is not None and not isinstance(kid, str):
            raise Rejected("The token's kid is not a string.")
        key = await self._find(kid, algorithm)
        try:
            claims: dict[str, Any] = jwt.decode(
                token,
                key.key,
                algorithms=[algorithm],
                audience=self._audience,
                issuer=self._issuer,
                leeway=LEEWAY,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except jwt.ExpiredSignatureError:
            raise Rejected("The token has expired.") from None
        except (jwt.ImmatureSignatureError, jwt.InvalidIssuedAtError):
            raise Rejected("The token is not valid yet.") from None
        except jwt.InvalidAudienceError:
            raise Rejected("The token is for another audience.") from None
        except jwt.InvalidIssuerError:
            raise Rejected("The token is of another issuer.") from None
        except jwt.MissingRequiredClaimError as error:
            raise Rejected(f"The token has no {error.claim}.") from None
        except jwt.InvalidSignatureError:
            raise Rejected("The token's signature is wrong.") from None
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError):
            raise Rejected("The token is malformed.") from None
        return claims

    async def renewed(self) -> float:
        """`fetched_at` of the current keys, which identifies them.

        Raises Problem (unavailable) if there are none.
        """
        await self._renew_in_time()
        return self.fetched_at

    async def _renew_in_time(self) -> None:
        """Step 2."""
        now = self._clock()
        if now - self.fetched_at > STALE:
            if self._busy or now - self._tried_at > FAILURE_PAUSE:
                await self._fetch()
            if self._clock() - self.fetched_at > STALE:
                raise unavailable("The identity provider does not answer; try again.")
        elif now - self.fetched_at > FRESH and now - self._tried_at > PAUSE:
            self._start()

    async def _find(self, kid: str | None, algorithm: str) -> Key:
        await self._renew_in_time()
        found = self._match(kid, algorithm)
        if found is None and (self._busy or self._clock() - self._tried_at > PAUSE):
            await self._fetch()
            found = self._match(kid, algorithm)
        if found is None:
            raise Rejected("The token was signed by a key that the issuer does not publish.")
        return found

    def _match(self, kid: str | None, algorithm: str) -> Key | None:
        """The key that fits, if exactly one does. Without a kid, keys of any id fit."""
        fitting = [key for key in self._keys if algorithm in key.algorithms and kid in (None, key.kid)]
        return fitting[0] if len(fitting) == 1 else None

    @property
    def _busy(self) -> bool:
        return self._fetching is not None and not self._fetching.done()

    def _start(self) -> asyncio.Task[None]:
        if self._fetching is None or self._fetching.done():
            self._fetching = asyncio.create_task(self._renew())
        return self._fetching

    async def _fetch(self) -> None:
        await asyncio.shield(self._start())  # a request that stops waiting must not cancel it for others

    async def _renew(self) -> None:
        self._tried_at = begun = self._clock()
        try:
            async with asyncio.timeout(2 * FETCH_TIMEOUT):
                found = await self._discover()
                keys = [key for jwk in found[:MAX_KEYS] if (key := _usable(jwk))]
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, Unusable) as error:
            log.warning("issuer_keys_not_fetched", issuer=self._issuer, error=str(error) or repr(error))
            return
        self._keys, self.fetched_at = keys, begun
        log.info("issuer_keys", issuer=self._issuer, keys=[key.kid for key in keys])

    async def endpoint(self, name: str) -> str:
        """A URL of the discovery document, which is fetched again. Raises Problem (unavailable)."""
        try:
            return self._url(await self._document(), name)
        except (httpx.HTTPError, httpx.InvalidURL, Unusable) as error:
            log.warning("issuer_not_discovered", issuer=self._issuer, error=str(error) or repr(error))
            raise unavailable("The identity provider does not answer; try again.") from None

    async def _document(self) -> dict[str, Any]:
        found = await self._get(f"{self._issuer.rstrip('/')}/.well-known/openid-configuration")
        if found.get("issuer") != self._issuer:
            raise Unusable("the discovery document is of another issuer")
        return found

    def _url(self, document: Mapping[str, Any], name: str) -> str:
        url = document.get(name)
        if not isinstance(url, str) or (self._secure and not url.startswith("https://")):
            raise Unusable(f"the discovery document has no {name} that is as safe as the issuer's URL")
        return url

    async def _discover(self) -> list[Any]:
        keys = (await self._get(self._url(await self._document(), "jwks_uri"))).get("keys")
        if not isinstance(keys, list):
            raise Unusable("the issuer's key set is none")
        return keys

    async def _get(self, url: str) -> dict[str, Any]:
        status, document = await ask(self._client, "GET", url)
        if status != 200:
            raise Unusable(f"{url} answers {status}")
        if document is None:
            raise Unusable(f"{url} is not a JSON object")
        return document


async def ask(
    client: httpx.AsyncClient, method: str, url: str, **more: Any
) -> tuple[int, IssuerAnswer | None]:
    """An issuer's status and JSON object, if it is one. At most MAX_DOCUMENT bytes in FETCH_TIMEOUT seconds.

    Nothing is decompressed: a few kilobytes would become gigabytes. Raises Unusable, httpx.HTTPError.
    """
    headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
    try:
        async with (
            asyncio.timeout(FETCH_TIMEOUT),
            client.stream(method, url, headers=headers, **more) as response,
        ):
            if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
                raise Unusable(f"{url} is compressed")
            text = bytearray()
            async for chunk in response.aiter_raw():
                text += chunk
                if len(text) > MAX_DOCUMENT:
                    raise Unusable(f"{url} is longer than {MAX_DOCUMENT} bytes")
    except TimeoutError:
        raise Unusable(f"{url} takes longer than {FETCH_TIMEOUT:g} s") from None
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        document = None
    return response.status_code, document if isinstance(document, dict) else None


def _usable(jwk: Any) -> Key | None:
    """The key, or None if it is symmetric, weak, or not for signatures."""
    if not isinstance(jwk, dict) or jwk.get("use", "sig") != "sig":
        return None
    kind = (str(jwk.get("kty")), jwk.get("crv"))
    kid, named = jwk.get("kid"), jwk.get("alg")
    try:
        algorithms = frozenset(_BY_KEY.get(kind, ()))
        if named is not None:
            algorithms &= {named}
        if not algorithms or not (kid is None or isinstance(kid, str)):
            return None
        key = jwt.PyJWK(jwk, min(algorithms)).key
    except (jwt.PyJWTError, ValueError, TypeError):
        return None
    if isinstance(key, RSAPublicKey) and key.key_size < MIN_RSA_BITS:
        return None
    # A published private key proves nothing, because anybody can sign with it.
    return Key(kid, algorithms, key) if "d" not in jwk else None


def has_role(claims: Mapping[str, Any], claim: str, role: str) -> bool:
    """Whether the claim has the role. The claim is a list of strings, or one string with spaces.

    `claim` is the claim's name, or a path of names with dots: `realm_access.roles`.
    """
    value: Any = claims.get(claim)
    if claim not in claims:
        value = claims
        for name in claim.split("."):
            value = value.get(name) if isinstance(value, dict) else None
    if isinstance(value, str):
        return role in value.split()
    return isinstance(value, list) and role in value
