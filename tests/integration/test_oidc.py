"""Tokens of an issuer: whose they are, and what is asked of the issuer, when."""

import asyncio
import gzip
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, cast

import httpx
import pytest
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from outwake.app.api.problems import Problem
from outwake.app.auth import identity, oidc
from outwake.app.auth.identity import Authenticator
from outwake.app.auth.oidc import Issuer, Rejected, check_issuer, has_role
from outwake.app.database import Database
from outwake.errors import ConfigurationError
from outwake.settings import Settings
from tests.support.issuer import SigningKey, StandIn, issuing


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def stand_in() -> AsyncIterator[StandIn]:
    async with issuing() as issuer:
        yield issuer


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def issuer(stand_in: StandIn, clock: Clock) -> AsyncIterator[Issuer]:
    found = Issuer(settings(stand_in.url), clock)
    yield found
    await found.close()


def settings(url: str, **changes: Any) -> Settings:
    return Settings.model_validate({"DATABASE_URL": "x", "OUTWAKE_OIDC_ISSUER": url, **changes})


async def test_first_tokens_fetch_the_keys_once(stand_in: StandIn, issuer: Issuer) -> None:
    stand_in.gate.clear()
    verifying = [asyncio.create_task(issuer.verify(stand_in.token(f"user-{n}"))) for n in range(50)]
    await asyncio.sleep(0)
    stand_in.gate.set()
    claims = await asyncio.gather(*verifying)
    assert [found["sub"] for found in claims] == [f"user-{n}" for n in range(50)]
    assert stand_in.fetches == 1


async def test_elliptic_keys_sign_too(stand_in: StandIn, issuer: Issuer) -> None:
    key = SigningKey("curve", "ES256")
    stand_in.published.append(key.jwk)
    assert (await issuer.verify(stand_in.token(key=key)))["sub"] == "alice"


async def test_a_new_key_is_known_as_soon_as_it_signs(
    stand_in: StandIn, issuer: Issuer, clock: Clock
) -> None:
    await issuer.verify(stand_in.token())
    stand_in.key = SigningKey("second")
    stand_in.published = [stand_in.key.jwk]
    clock.now += oidc.PAUSE + 1
    await issuer.verify(stand_in.token())
    assert stand_in.fetches == 2


async def test_invented_keys_cost_the_issuer_one_request_each_pause(
    stand_in: StandIn, issuer: Issuer, clock: Clock
) -> None:
    await issuer.verify(stand_in.token())
    for _ in range(3):
        clock.now += oidc.PAUSE + 1
        storm = [issuer.verify(stand_in.token(headers={"kid": f"invented-{n}"})) for n in range(100)]
        assert all(
            isinstance(found, Rejected) for found in await asyncio.gather(*storm, return_exceptions=True)
        )
    assert stand_in.fetches == 4


async def test_a_withdrawn_key_ends_once_the_keys_are_renewed(
    stand_in: StandIn, issuer: Issuer, clock: Clock
) -> None:
    old = stand_in.token()
    await issuer.verify(old)
    stand_in.key = SigningKey("second")
    stand_in.published = [stand_in.key.jwk]
    clock.now += oidc.FRESH + 1
    await issuer.verify(old)  # served by what is known, while the keys are renewed
    assert issuer._fetching is not None
    await issuer._fetching
    with pytest.raises(Rejected, match="does not publish"):
        await issuer.verify(old)


@pytest.mark.parametrize(
    "answer",
    [Response(status_code=500), PlainTextResponse("[]"), PlainTextResponse("{" * 10)],
    ids=["500", "a list", "no JSON"],
)
async def test_keys_outlast_an_issuer_that_fails_but_not_for_ever(
    stand_in: StandIn, issuer: Issuer, clock: Clock, answer: Response
) -> None:
    token = stand_in.token()
    await issuer.verify(token)
    stand_in.broken = answer
    clock.now += oidc.STALE - 1
    await issuer.verify(token)
    clock.now += 2
    with pytest.raises(Problem) as raised:
        await issuer.verify(token)
    assert raised.value.kind == "unavailable"
    stand_in.broken = None
    clock.now += oidc.FAILURE_PAUSE + 1
    await issuer.verify(token)


async def test_without_keys_a_failing_issuer_is_not_asked_by_every_request(
    stand_in: StandIn, issuer: Issuer
) -> None:
    stand_in.document = {"jwks_uri": f"{stand_in.url}/nowhere"}
    for _ in range(20):
        with pytest.raises(Problem):
            await issuer.verify(stand_in.token())
    stand_in.document = {}
    with pytest.raises(Problem):  # by the clock no time has passed
        await issuer.verify(stand_in.token())
    assert stand_in.fetches == 0


async def test_a_document_of_another_issuer_is_not_believed(stand_in: StandIn, issuer: Issuer) -> None:
    stand_in.document = {"issuer": "https://issuer.example"}
    with pytest.raises(Problem):
        await issuer.verify(stand_in.token())


async def test_keys_that_are_of_no_use_are_left_out(stand_in: StandIn, issuer: Issuer) -> None:
    useful = stand_in.key.jwk
    stand_in.published = [
        None,
        {"kty": "oct", "k": "c2VjcmV0", "kid": "oct", "alg": "HS256"},
        {"kty": "RSA", "kid": "half"},
        {**useful, "kid": "encrypts", "use": "enc"},
        {**useful, "kid": 7},
        {**useful, "kid": "private", "d": "AQAB"},
        SigningKey("weak", bits=1024).jwk,
        useful,
    ]
    assert (await issuer.verify(stand_in.token(headers={"kid": None})))["sub"] == "alice"
    assert [key.kid for key in issuer._keys] == ["first"]


async def test_clocks_may_differ_by_the_leeway(stand_in: StandIn, issuer: Issuer) -> None:
    claims = stand_in.claims()
    await issuer.verify(stand_in.token(exp=claims["iat"] - oidc.LEEWAY + 15))
    await issuer.verify(stand_in.token(nbf=claims["iat"] + oidc.LEEWAY - 1))
    with pytest.raises(Rejected, match="expired"):
        await issuer.verify(stand_in.token(exp=claims["iat"] - oidc.LEEWAY - 1))


@pytest.mark.parametrize("url", ["issuer.example", "ftp://issuer.example", "https://", "https://a/?b", "::"])
def test_an_issuer_that_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="OUTWAKE_OIDC_ISSUER"):
        check_issuer(settings(url))


@pytest.mark.parametrize(
    ("claims", "claim", "holds"),
    [
        ({"realm_access": {"roles": ["a", "op"]}}, "realm_access.roles", True),
        ({"realm_access": {"roles": ["operator"]}}, "realm_access.roles", False),
        ({"realm_access": {"roles": "a op"}}, "realm_access.roles", True),
        ({"realm_access": ["op"]}, "realm_access.roles", False),
        ({"realm_access": {"roles": {"op": True}}}, "realm_access.roles", False),
        ({}, "realm_access.roles", False),
        ({"https://example.com/roles": ["op"]}, "https://example.com/roles", True),
        ({"scope": "openid op"}, "scope", True),
        ({"scope": "openid opx"}, "scope", False),
    ],
)
def test_roles(claims: dict[str, Any], claim: str, holds: bool) -> None:
    assert has_role(claims, claim, "op") is holds


@pytest.fixture
async def authenticator(stand_in: StandIn, clock: Clock) -> AsyncIterator[Authenticator]:
    found = Authenticator(settings(stand_in.url), database=cast(Database, None))  # of no API token is asked
    assert found.issuer is not None
    found.issuer._clock = clock
    yield found
    await found.close()


async def test_a_token_is_verified_once_while_the_same_keys_count(
    stand_in: StandIn, authenticator: Authenticator, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = stand_in.token()
    first = await authenticator.by_token(token)
    with monkeypatch.context() as patched:
        patched.setattr(Issuer, "verify", None)
        assert await authenticator.by_token(token) is first
    with pytest.raises(Problem):  # the same claims, another signature
        await authenticator.by_token(token[:-8] + "AAAAAAAA")

    stand_in.key = SigningKey("second")
    stand_in.published = [stand_in.key.jwk]
    clock.now += oidc.FRESH + 1
    await authenticator.by_token(token)  # renews the keys meanwhile
    assert authenticator.issuer is not None
    assert authenticator.issuer._fetching is not None
    await authenticator.issuer._fetching
    with pytest.raises(Problem, match="does not publish"):
        await authenticator.by_token(token)


async def test_a_token_that_was_verified_expires(stand_in: StandIn, authenticator: Authenticator) -> None:
    token = stand_in.token()
    found = await authenticator.by_token(token)
    ((key, (_, keys)),) = authenticator._verified.items()
    authenticator._verified[key] = (replace(found, user_id="past", until=time.monotonic()), keys)
    assert (await authenticator.by_token(token)).user_id == "alice"  # is verified anew


async def test_only_so_many_verified_tokens_are_remembered(
    stand_in: StandIn, authenticator: Authenticator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "REMEMBERED", 2)
    for user in ("alice", "bob", "carol"):
        await authenticator.by_token(stand_in.token(user))
    assert [known.user_id for known, _ in authenticator._verified.values()] == ["bob", "carol"]


async def test_without_keys_a_verified_token_is_not_believed(
    stand_in: StandIn, authenticator: Authenticator, clock: Clock
) -> None:
    token = stand_in.token()
    await authenticator.by_token(token)
    stand_in.broken = Response(status_code=500)
    clock.now += oidc.STALE + 1
    with pytest.raises(Problem) as raised:
        await authenticator.by_token(token)
    assert raised.value.kind == "unavailable"


class Endless(Response):
    """An answer without end. `sent` counts its bytes."""

    sent = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while self.sent < 200_000_000:
            await send({"type": "http.response.body", "body": b" " * 65_536, "more_body": True})
            self.sent += 65_536
            await asyncio.sleep(0)


async def test_an_issuers_answer_is_counted_and_never_decompressed(stand_in: StandIn, issuer: Issuer) -> None:
    stand_in.broken = endless = Endless()
    with pytest.raises(Problem, match="identity provider"):
        await issuer.verify(stand_in.token())
    assert endless.sent < 20_000_000
    bomb = gzip.compress(b" " * 50_000_000)
    stand_in.broken = Response(bomb, headers={"Content-Encoding": "gzip"})
    async with httpx.AsyncClient() as client:
        with pytest.raises(oidc.Unusable, match="compressed"):
            await oidc.ask(client, "GET", f"{stand_in.url}/certs")


async def test_an_issuer_that_drips_is_given_up(
    stand_in: StandIn, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oidc, "FETCH_TIMEOUT", 0.2)
    stand_in.gate.clear()
    try:
        with pytest.raises(Problem, match="identity provider"):
            await issuer.verify(stand_in.token())
    finally:
        stand_in.gate.set()
