"""A stand-in of an OpenID Connect issuer: discovery and keys by real HTTP, tokens signed as a test wants.

Its tokens have Keycloak's shape: roles in `realm_access`, `azp`, `typ`, and an audience list.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.support.http import listening

AUDIENCE = "outwake"
CLIENT = "outwake-cli"
OPERATOR_ROLE = "outwake-operator"


class SigningKey:
    """A private key with its kid and algorithm."""

    def __init__(self, kid: str, algorithm: Literal["RS256", "ES256"] = "RS256", bits: int = 2048) -> None:
        self.kid = kid
        self.algorithm = algorithm
        self.private: Any = (
            rsa.generate_private_key(65537, bits)
            if algorithm == "RS256"
            else ec.generate_private_key(ec.SECP256R1())
        )

    @property
    def jwk(self) -> dict[str, Any]:
        """The public key as it is published."""
        kind = RSAAlgorithm if self.algorithm == "RS256" else ECAlgorithm
        made: dict[str, Any] = kind.to_jwk(self.private.public_key(), as_dict=True)
        made.pop("key_ops", None)
        return {**made, "kid": self.kid, "use": "sig", "alg": self.algorithm}


class StandIn:
    """The issuer. `published` are the JWKs it shows; `fetches` counts how often they were read."""

    def __init__(self) -> None:
        self.url = ""
        self.key = SigningKey("first")
        self.published: list[Any] = [self.key.jwk, SigningKey("elliptic", "ES256").jwk]
        self.fetches = 0
        self.broken: Response | None = None
        self.document: dict[str, Any] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        routes = [Route("/.well-known/openid-configuration", self._discovery), Route("/certs", self._certs)]
        self.app = Starlette(routes=routes)

    def claims(self, user: str = "alice", *, operator: bool = False, **changes: Any) -> dict[str, Any]:
        """What a token of the user says; a change to None leaves the claim out."""
        now = int(time.time())
        claims = {
            "iss": self.url,
            "aud": [AUDIENCE, "account"],
            "sub": user,
            "azp": CLIENT,
            "typ": "Bearer",
            "iat": now,
            "exp": now + 300,
            "realm_access": {"roles": ["offline_access", *([OPERATOR_ROLE] if operator else [])]},
            "resource_access": {"account": {"roles": ["view-profile"]}},
            "scope": "openid profile",
            "preferred_username": user,
            **changes,
        }
        return {name: value for name, value in claims.items() if value is not None}

    def token(
        self,
        user: str = "alice",
        *,
        operator: bool = False,
        key: SigningKey | None = None,
        headers: dict[str, Any] | None = None,
        **changes: Any,
    ) -> str:
        """A signed token."""
        signer = key or self.key
        claims = self.claims(user, operator=operator, **changes)
        head = {"kid": signer.kid, **(headers or {})}
        head = {name: value for name, value in head.items() if value is not None}
        return jwt.encode(claims, signer.private, algorithm=signer.algorithm, headers=head)

    async def _discovery(self, request: Request) -> Response:
        await self.gate.wait()
        found = {"issuer": self.url, "jwks_uri": f"{self.url}/certs", **self.document}
        return self.broken or JSONResponse(found)

    async def _certs(self, request: Request) -> Response:
        self.fetches += 1
        return self.broken or JSONResponse({"keys": self.published})


@asynccontextmanager
async def issuing() -> AsyncIterator[StandIn]:
    """A stand-in that answers until the block ends."""
    issuer = StandIn()
    async with listening(issuer.app) as url:
        issuer.url = url
        yield issuer


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}
