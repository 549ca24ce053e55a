"""Attacks and the answer each gets. docs/security.md shows the table below, made by
`python -m tests.integration.test_attacks`; the test holds each answer to it.
"""

import asyncio
import base64
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import httpx
import jwt
import psycopg
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from starlette.responses import RedirectResponse

from outwake.app.auth import oidc
from outwake.session import token
from outwake.session.callback import Address, CallbackError
from outwake.settings import Settings
from outwake.worker.handlers.webhook import post
from tests.support.api import Api, serving
from tests.support.database import new_database
from tests.support.http import Receiver, listening
from tests.support.issuer import SigningKey, StandIn, bearer, issuing
from tests.support.server import with_database
from tests.support.waits import awaiting

PAGE = Path(__file__).parents[2] / "docs" / "security.md"
BEGIN, END = "<!-- attacks -->\n", "<!-- /attacks -->\n"

WEBHOOK_SECRET = "whsec_" + base64.b64encode(b"s" * 32).decode()


@dataclass
class Place:
    """An API that takes tokens of an issuer. Alice and Bob are users; what is attacked is Alice's."""

    api: Api
    issuer: StandIn
    conn: psycopg.AsyncConnection[Any]
    alice: str = ""
    """The id of Alice's session."""
    receiver: Receiver = field(default_factory=Receiver)
    receiver_url: str = ""

    async def ask(
        self, method: str, path: str, *, user: str | None = "bob", headers: Any = None, **more: Any
    ) -> httpx.Response:
        """A request of the user's; with None only the headers that are given."""
        given = dict(bearer(self.issuer.token(user))) if user else {}
        sent = [*given.items(), *(headers or {}).items()] if not isinstance(headers, list) else headers
        return await self.api.client.request(method, path, headers=sent, **more)

    async def create(self, user: str, headers: Any = None, **fields: Any) -> httpx.Response:
        asked = {"repo": "octo/tools", "target_branch": "main", "prompt": "Do it", **fields}
        return await self.ask("POST", "/sessions", user=user, headers=headers, json=asked)


Run = Callable[[Place], Awaitable[str]]


class Attack(NamedTuple):
    name: str
    expected: str
    run: Run


def answer(response: httpx.Response) -> str:
    """Status, and the kind of problem."""
    if response.headers.get("content-type", "").startswith("application/problem+json"):
        problem = response.json()
        assert problem["status"] == response.status_code
        return f"{response.status_code} {problem['type'].rpartition(':')[2]}"
    return str(response.status_code)


# Authentication


def by_headers(*headers: tuple[str, str]) -> Run:
    async def run(place: Place) -> str:
        return answer(await place.ask("GET", "/sessions", user=None, headers=list(headers)))

    return run


def by_token(make: Callable[[StandIn], str]) -> Run:
    async def run(place: Place) -> str:
        response = await place.ask("GET", "/sessions", user=None, headers=bearer(make(place.issuer)))
        detail = f": {response.json()['detail']}" if response.is_error else ""
        return answer(response) + detail

    return run


def now(issuer: StandIn) -> int:
    return int(issuer.claims()["iat"])


def unsigned(issuer: StandIn, algorithm: str = "none") -> str:
    head = _part({"alg": algorithm, "typ": "JWT", "kid": issuer.key.kid})
    return f"{head}.{_part(issuer.claims(operator=True))}."


def by_public_key(issuer: StandIn) -> str:
    """HS256, with the public key as the secret."""
    pem = issuer.key.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    head = _part({"alg": "HS256", "typ": "JWT", "kid": issuer.key.kid})
    text = f"{head}.{_part(issuer.claims(operator=True))}"
    signature = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256).sign(text.encode(), pem)
    return f"{text}.{_base64(signature)}"


def changed(issuer: StandIn) -> str:
    """Another payload under a good signature."""
    head, _, signature = issuer.token("bob").split(".")
    return f"{head}.{_part(issuer.claims('alice', operator=True))}.{signature}"


def other_kind_of_key(issuer: StandIn) -> str:
    return issuer.token(key=SigningKey(issuer.key.kid, "ES256"))


def own_key(issuer: StandIn) -> str:
    return issuer.token(key=SigningKey(issuer.key.kid))


def key_in_header(issuer: StandIn) -> str:
    key = SigningKey(issuer.key.kid)
    return issuer.token(key=key, headers={"jwk": key.jwk})


async def key_by_url(place: Place) -> str:
    before = len(place.receiver.received)
    headers = {"jku": f"{place.receiver_url}/keys", "x5u": f"{place.receiver_url}/certificate"}
    forged = place.issuer.token(key=SigningKey("mine"), headers=headers)
    response = await place.ask("GET", "/sessions", user=None, headers=bearer(forged))
    return f"{answer(response)}, {len(place.receiver.received) - before} requests to the URL"


async def storm(place: Place) -> str:
    await place.ask("GET", "/sessions")
    before = place.issuer.fetches
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(oidc, "PAUSE", 3600.0)  # however long they take here
    tokens = [place.issuer.token(headers={"kid": f"invented-{n}"}) for n in range(200)]
    asked = (place.ask("GET", "/sessions", user=None, headers=bearer(text)) for text in tokens)
    answers = {answer(response) for response in await asyncio.gather(*asked)}
    monkeypatch.undo()
    fetched = place.issuer.fetches - before
    assert fetched <= 1, f"{fetched} fetches"
    return f"{', '.join(sorted(answers))}; the issuer is asked once at most"


async def operator_by(place: Place, **claims: Any) -> str:
    """/outbox with these claims instead of the role."""
    text = place.issuer.token("bob", **claims)
    return answer(await place.ask("GET", "/outbox", user=None, headers=bearer(text)))


def api_token(how: str) -> Run:
    async def run(place: Place) -> str:
        days = timedelta(days=-1) if how == "expired" else None
        token_id, text = await token.create(place.conn, "alice", how, valid_for=days)
        if how == "revoked":
            assert await token.revoke(place.conn, token_id)
        if how == "changed":
            text = text[:-2] + ("AA" if text[-2:] != "AA" else "BA")
        if how == "hash":
            text = token.PREFIX + _base64(token.hash_of(text))
        return answer(await place.ask("GET", "/sessions", user=None, headers=bearer(text)))

    return run


async def stored_tokens(place: Place) -> str:
    _, text = await token.create(place.conn, "alice", "stored")
    cursor = await place.conn.execute("SELECT string_agg(t::text, '') FROM api_token AS t")
    row = await cursor.fetchone()
    assert row is not None
    return "nothing of a token" if text[8:] not in row[0] else "the token"


AUTHENTICATION = [
    Attack("No token", "401 unauthorized", by_headers()),
    Attack("Another scheme: `Basic`", "401 unauthorized", by_headers(("Authorization", "Basic YTpi"))),
    Attack("`Bearer` without a token", "401 unauthorized", by_headers(("Authorization", "Bearer"))),
    Attack(
        "Two Authorization headers",
        "401 unauthorized",
        lambda place: by_headers(
            ("Authorization", f"Bearer {place.issuer.token('bob')}"),
            ("Authorization", f"Bearer {place.issuer.token('alice')}"),
        )(place),
    ),
    Attack(
        "A token in the query string",
        "401 unauthorized",
        lambda place: _answer(place.ask("GET", f"/sessions?access_token={place.issuer.token()}", user=None)),
    ),
    Attack(
        "A token in a cookie",
        "401 unauthorized",
        lambda place: by_headers(("Cookie", f"access_token={place.issuer.token()}"))(place),
    ),
    Attack(
        "Headers that a proxy might set: X-Forwarded-User, X-Remote-User, X-User-Id",
        "401 unauthorized",
        by_headers(("X-Forwarded-User", "alice"), ("X-Remote-User", "alice"), ("X-User-Id", "alice")),
    ),
    Attack(
        "Not a JWT",
        "401 unauthorized: The token is not a signed JWT that can be read.",
        by_token(lambda i: "abc.def"),
    ),
    Attack(
        "An encrypted token (JWE)",
        "401 unauthorized: The token is not a signed JWT that can be read.",
        by_token(lambda i: ".".join([_part({"alg": "RSA-OAEP", "enc": "A256GCM"}), "a", "b", "c", "d"])),
    ),
    Attack(
        "Expired", "401 unauthorized: The token has expired.", by_token(lambda i: i.token(exp=now(i) - 60))
    ),
    Attack(
        "Not valid yet (`nbf`)",
        "401 unauthorized: The token is not valid yet.",
        by_token(lambda i: i.token(nbf=now(i) + 600)),
    ),
    Attack(
        "Issued in the future (`iat`)",
        "401 unauthorized: The token is not valid yet.",
        by_token(lambda i: i.token(iat=now(i) + 600)),
    ),
    Attack(
        "Another audience",
        "401 unauthorized: The token is for another audience.",
        by_token(lambda i: i.token(aud=["account", "outwake2"])),
    ),
    Attack("No audience", "401 unauthorized: The token has no aud.", by_token(lambda i: i.token(aud=None))),
    Attack(
        "Another issuer",
        "401 unauthorized: The token is of another issuer.",
        by_token(lambda i: i.token(iss=i.url + "/")),
    ),
    Attack(
        "No end (`exp`)", "401 unauthorized: The token has no exp.", by_token(lambda i: i.token(exp=None))
    ),
    Attack(
        "An end that is no number",
        "401 unauthorized: The token is malformed.",
        by_token(lambda i: i.token(exp="never")),
    ),
    Attack("An end beyond all calendars", "200", by_token(lambda i: i.token(exp=10**400))),
    Attack("An end in digits, but a string", "200", by_token(lambda i: i.token(exp=str(now(i) + 300)))),
    Attack("No `sub`", "401 unauthorized: The token has no sub.", by_token(lambda i: i.token(sub=None))),
    Attack(
        "A `sub` with a NUL in it",
        "401 unauthorized: The token's sub cannot be a user's name.",
        by_token(lambda i: i.token(sub="alice\0")),
    ),
    Attack(
        "A `sub` that is a list",
        "401 unauthorized: The token is malformed.",
        by_token(lambda i: i.token(sub=["alice"])),
    ),
    Attack(
        "Unsigned: `alg` none",
        "401 unauthorized: The token's algorithm is not accepted.",
        by_token(unsigned),
    ),
    Attack(
        "Unsigned: `alg` nOnE",
        "401 unauthorized: The token's algorithm is not accepted.",
        by_token(lambda i: unsigned(i, "nOnE")),
    ),
    Attack(
        "HS256, with the public key as the secret",
        "401 unauthorized: The token's algorithm is not accepted.",
        by_token(by_public_key),
    ),
    Attack(
        "The payload changed after signing",
        "401 unauthorized: The token's signature is wrong.",
        by_token(changed),
    ),
    Attack(
        "Own key under a known `kid`", "401 unauthorized: The token's signature is wrong.", by_token(own_key)
    ),
    Attack(
        "Own key in the header (`jwk`)",
        "401 unauthorized: The token's signature is wrong.",
        by_token(key_in_header),
    ),
    Attack("Own key by URL (`jku`, `x5u`)", "401 unauthorized, 0 requests to the URL", key_by_url),
    Attack(
        "A known `kid` with another kind of key",
        "401 unauthorized: The token was signed by a key that the issuer does not publish.",
        by_token(other_kind_of_key),
    ),
    Attack(
        "A `kid` that is a path: `../../dev/null`",
        "401 unauthorized: The token was signed by a key that the issuer does not publish.",
        by_token(lambda i: i.token(headers={"kid": "../../dev/null"})),
    ),
    Attack(
        "A `kid` that is SQL",
        "401 unauthorized: The token was signed by a key that the issuer does not publish.",
        by_token(lambda i: i.token(headers={"kid": "' OR 1=1 --"})),
    ),
    Attack(
        "A critical extension (`crit`)",
        "401 unauthorized: The token is not a signed JWT that can be read.",
        by_token(lambda i: i.token(headers={"crit": ["exp"]})),
    ),
    Attack(
        "200 invented `kid`s at once",
        "401 unauthorized; the issuer is asked once at most",
        storm,
    ),
    Attack(
        "A token of 20 KB",
        "401 unauthorized: The Authorization header holds no bearer token.",
        by_token(lambda i: i.token(padding="x" * 20_000)),
    ),
    Attack(
        "The operator's role among client roles",
        "403 forbidden",
        lambda place: operator_by(place, resource_access={"outwake": {"roles": ["outwake-operator"]}}),
    ),
    Attack(
        "The operator's role as a part of another's name",
        "403 forbidden",
        lambda place: operator_by(place, realm_access={"roles": ["no-outwake-operator"]}),
    ),
    Attack("An API token with its end changed", "401 unauthorized", api_token("changed")),
    Attack("An API token that has expired", "401 unauthorized", api_token("expired")),
    Attack("An API token that was revoked", "401 unauthorized", api_token("revoked")),
    Attack("The stored hash as an API token", "401 unauthorized", api_token("hash")),
    Attack("Reading the table of API tokens", "nothing of a token", stored_tokens),
]


# Ownership


def others(method: str, path: str = "", **more: Any) -> Run:
    """A request of Bob's about Alice's session, compared with one about a session that is not there."""

    async def run(place: Place) -> str:
        asked = await place.ask(method, f"/sessions/{place.alice}{path}", **more)
        nobodys = await place.ask(method, f"/sessions/{uuid4()}{path}", **more)
        assert asked.content == nobodys.content
        return answer(asked)

    return run


async def parent(place: Place) -> str:
    response = await place.create("bob", parent=place.alice)
    return f"{answer(response)}: {response.json()['errors'][0]['detail']}"


async def same_key(place: Place) -> str:
    """Bob repeats Alice's request under her Idempotency-Key."""
    key = {"Idempotency-Key": str(uuid4())}
    first = await place.create("alice", key, title="Same")
    second = await place.create("bob", key, title="Same")
    assert first.status_code == 201, first.text
    assert "idempotent-replayed" not in second.headers
    assert second.json()["id"] != first.json()["id"]
    return f"{answer(second)}, a session of {second.json()['user_id']}'s own"


async def operators_key(place: Place) -> str:
    """An operator prompts Alice's session; Alice uses the operator's key there herself."""
    key = {"Idempotency-Key": str(uuid4())}
    path = f"/sessions/{place.alice}/prompts"
    by_operator = bearer(place.issuer.token("olga", operator=True))
    first = await place.ask("POST", path, user=None, headers={**by_operator, **key}, json={"prompt": "x"})
    assert first.status_code == 201
    second = await place.ask("POST", path, user="alice", headers=key, json={"prompt": "y"})
    assert "idempotent-replayed" not in second.headers
    return f"{answer(second)}, a turn of its own"


async def listing(place: Place) -> str:
    mine = (await place.create("bob")).json()["id"]
    found: list[dict[str, Any]] = []
    for query in ("", "?session_status=any", "?repo=octo/tools"):
        found += (await place.ask("GET", f"/sessions{query}")).json()["sessions"]
    assert mine in {session["id"] for session in found}
    return f"sessions of {', '.join(sorted({session['user_id'] for session in found}))}"


async def cursor_of_another(place: Place) -> str:
    for user in ("bob", "alice", "alice"):
        assert (await place.create(user)).status_code == 201
    page = (await place.ask("GET", "/sessions?limit=1", user="alice")).json()
    found = (await place.ask("GET", f"/sessions?cursor={page['next']}")).json()["sessions"]
    return f"sessions of {', '.join(sorted({session['user_id'] for session in found}) or ['nobody'])}"


OWNERSHIP = [
    Attack("Show another's session", "404 not-found", others("GET")),
    Attack("Rename another's session", "404 not-found", others("PATCH", json={"title": "Mine"})),
    Attack("Archive another's session", "404 not-found", others("DELETE")),
    Attack("Prompt another's session", "404 not-found", others("POST", "/prompts", json={"prompt": "x"})),
    Attack("Cancel another's session", "404 not-found", others("POST", "/cancel")),
    Attack("Read another's messages", "404 not-found", others("GET", "/messages?attempts=all")),
    Attack("Follow another's events", "404 not-found", others("GET", "/events")),
    Attack(
        "Follow another's events from a Last-Event-ID on",
        "404 not-found",
        others("GET", "/events", headers={"Last-Event-ID": "0"}),
    ),
    Attack("Continue another's session (`parent`)", "422 invalid: there is no such session", parent),
    Attack("Another's Idempotency-Key, same request", "201, a session of bob's own", same_key),
    Attack("An operator's Idempotency-Key on one's own session", "201, a turn of its own", operators_key),
    Attack("List sessions", "sessions of bob", listing),
    Attack("List from another's cursor on", "sessions of bob", cursor_of_another),
    Attack(
        "Name another owner in the body",
        "422 invalid",
        lambda place: _answer(place.create("bob", user_id="alice")),
    ),
    Attack(
        "Name another owner in the query",
        "422 invalid",
        lambda place: _answer(place.ask("GET", "/sessions?user_id=alice")),
    ),
    Attack("Read the outbox", "403 forbidden", lambda place: _answer(place.ask("GET", "/outbox"))),
    Attack("Read a row of the outbox", "403 forbidden", lambda place: _answer(place.ask("GET", "/outbox/1"))),
    Attack(
        "Read a row that is not there",
        "403 forbidden",
        lambda place: _answer(place.ask("GET", "/outbox/999999")),
    ),
    Attack(
        "Cancel a row of the outbox",
        "403 forbidden",
        lambda place: _answer(place.ask("POST", "/outbox/1/cancel")),
    ),
]


# Input


def with_field(name: str, value: str) -> Run:
    async def run(place: Place) -> str:
        response = await place.create("bob", **{name: value})
        if response.status_code == 201:
            assert response.json()[name] == value
            return "201, kept as text"
        return answer(response)

    return run


async def sql_in_filter(place: Place) -> str:
    response = await place.ask("GET", "/sessions", params={"repo": "x' OR user_id <> 'bob"})
    return f"{answer(response)}, {len(response.json()['sessions'])} sessions"


def raw(make: Callable[[Place], bytes]) -> Run:
    """Bytes to the socket; the status line's number, for each answer."""

    async def run(place: Place) -> str:
        url = httpx.URL(place.api.url)
        reader, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(make(place))
        async with awaiting("the API to answer or hang up", timeout=30):
            text = await reader.read()
        writer.close()
        return ", ".join(re.findall(r"HTTP/1\.1 (\d+)", text.decode(errors="replace"))) or "nothing"

    return run


def head(place: Place, *lines: str) -> str:
    token_line = f"Authorization: Bearer {place.issuer.token('bob')}"
    return "\r\n".join(
        ["POST /sessions HTTP/1.1", "Host: x", token_line, "Connection: close", *lines, "", ""]
    )


def lone_surrogate(place: Place) -> Awaitable[str]:
    body = b'{"repo": "octo/tools", "target_branch": "main", "prompt": "\\ud800"}'
    return _answer(place.ask("POST", "/sessions", content=body, headers={"Content-Type": "application/json"}))


def body_of(content: bytes) -> Run:
    return lambda place: _answer(
        place.ask("POST", "/sessions", content=content, headers={"Content-Type": "application/json"})
    )


INPUT = [
    Attack("SQL in a title", "201, kept as text", with_field("title", "'); DROP TABLE session; --")),
    Attack("SQL in a filter", "200, 0 sessions", sql_in_filter),
    Attack(
        "SQL in a cursor",
        "422 invalid",
        lambda place: _answer(place.ask("GET", "/sessions", params={"cursor": "' OR 1=1 --"})),
    ),
    Attack("A shell command in a repository", "422 invalid", with_field("repo", "octo/tools;id")),
    Attack("A shell command in a branch", "422 invalid", with_field("branch", "a$(id)")),
    Attack("An option as a repository", "422 invalid", with_field("repo", "--upload-pack=id")),
    Attack("An option as a branch", "422 invalid", with_field("target_branch", "--output=x")),
    Attack("A program as a repository (`ext::`)", "422 invalid", with_field("repo", "ext::sh -c id")),
    Attack("A file as a repository", "422 invalid", with_field("repo", "file:///etc/passwd")),
    Attack("A path as a repository", "422 invalid", with_field("repo", "../../etc/passwd")),
    Attack("A path in a repository's URL", "422 invalid", with_field("repo", "https://git.example/../../x")),
    Attack(
        "A password in a repository's URL", "422 invalid", with_field("repo", "https://a:b@git.example/x")
    ),
    Attack("A path in a branch", "422 invalid", with_field("branch", "../../../etc/passwd")),
    Attack("A line break in a branch", "422 invalid", with_field("branch", "main\nrm")),
    Attack("A line break in a title", "422 invalid", with_field("title", "a\r\nb")),
    Attack("A NUL in a prompt", "422 invalid", with_field("prompt", "a\0b")),
    Attack("Half of a surrogate pair", "422 invalid", lone_surrogate),
    Attack(
        "A path instead of an id",
        "404 not-found",
        lambda place: _answer(place.ask("GET", "/sessions/..%2f..%2fetc%2fpasswd")),
    ),
    Attack(
        "A line break in an Idempotency-Key",
        "400",
        raw(lambda place: head(place, "Idempotency-Key: a\rb", "Content-Length: 0").encode()),
    ),
    Attack(
        "Content-Length and Transfer-Encoding at once (request smuggling)",
        "400",
        raw(
            lambda place: (
                head(place, "Content-Length: 4", "Transfer-Encoding: chunked")
                + "0\r\n\r\nGET /outbox HTTP/1.1\r\nHost: x\r\n\r\n"
            ).encode()
        ),
    ),
    Attack(
        "Two Content-Lengths",
        "400",
        raw(lambda place: head(place, "Content-Length: 4", "Content-Length: 5").encode() + b"abcde"),
    ),
    Attack("A body of 2 MB", "413 body-too-large", body_of(b'"' + b"x" * 2_000_000 + b'"')),
    Attack(
        "A body without an end that does not tell its length",
        "413",
        raw(
            lambda place: (
                head(place, "Content-Type: application/json", "Transfer-Encoding: chunked").encode()
                + (b"10000\r\n" + b"x" * 65536 + b"\r\n") * 16
                + b"1\r\nx\r\n"
            )
        ),
    ),
    Attack("JSON nested 100,000 deep", "400 malformed", body_of(b"[" * 100_000)),
    Attack("A number of 100,000 digits", "400 malformed", body_of(b"1" * 100_000)),
]


# Callbacks


def callback(url: str) -> Run:
    """A session that names it."""

    async def run(place: Place) -> str:
        return answer(await place.create("bob", callback_url=url))

    return run


def delivery(url: str, *answers: list[str]) -> Run:
    """A delivery, while the name has these addresses at one look-up after the other."""

    async def run(place: Place) -> str:
        looked_up: list[list[Address]] = []

        async def resolve(host: str, port: int) -> list[Address]:
            looked_up.append([ip_address(text) for text in answers[len(looked_up)]])
            return looked_up[-1]

        try:
            await post(url, "msg_1", b"{}", None, webhook_settings(""), resolve)
        except CallbackError as error:
            return f"not sent: {error}"
        return "sent"

    return run


async def rebinding(place: Place) -> str:
    """The first address a name has is checked and used; a second look-up would give the forbidden one."""
    port = httpx.URL(place.receiver_url).port
    looked_up: list[str] = []

    async def resolve(host: str, port: int) -> list[Address]:
        looked_up.append(host)
        return [ip_address("127.0.0.1" if len(looked_up) == 1 else "127.0.0.2")]

    settings = webhook_settings("127.0.0.1/32")
    await post(f"http://rebinding.example:{port}/hook", "msg_1", b"{}", None, settings, resolve)
    assert place.receiver.received[-1].headers["host"] == f"rebinding.example:{port}"
    return f"{len(looked_up)} look-up, sent to the address that was checked"


async def redirect(place: Place) -> str:
    before = len(place.receiver.received)
    place.receiver.answers.append(RedirectResponse(f"{place.receiver_url}/inside", 307))
    status, _ = await post(f"{place.receiver_url}/hook", "msg_1", b"{}", None, webhook_settings("127.0.0.1"))
    return f"{status}, a failure; {len(place.receiver.received) - before} request"


async def proxy(place: Place) -> str:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            patch.setenv(name, place.receiver_url)
        return await delivery("https://hooks.example/", ["127.0.0.1"])(place)


def webhook_settings(allow: str) -> Settings:
    return Settings.model_validate(
        {"DATABASE_URL": "x", "OUTWAKE_WEBHOOK_SECRET": WEBHOOK_SECRET, "OUTWAKE_WEBHOOK_ALLOW": allow}
    )


_LITERALS = [
    ("plain http", "http://hooks.example/"),
    ("another scheme", "gopher://hooks.example/"),
    ("a file", "file:///etc/passwd"),
    ("a user and password", "https://a:b@hooks.example/"),
    ("a backslash", "https://hooks.example\\@127.0.0.1/"),
    ("a line break", "https://hooks.example/\r\nX: y"),
    ("loopback", "https://127.0.0.1/"),
    ("loopback in decimal", "https://2130706433/"),
    ("loopback in octal", "https://0177.0.0.1/"),
    ("loopback in hexadecimal", "https://0x7f.0.0.1/"),
    ("loopback, shortened", "https://127.1/"),
    ("loopback in IPv6", "https://[::1]/"),
    ("loopback, mapped into IPv6", "https://[::ffff:127.0.0.1]/"),
    ("loopback by NAT64", "https://[64:ff9b::7f00:1]/"),
    ("loopback by 6to4", "https://[2002:7f00:1::]/"),
    ("loopback, IPv4-compatible", "https://[::7f00:1]/"),
    ("localhost", "https://localhost/"),
    ("a name without a dot", "https://metadata/"),
    ("all addresses (0.0.0.0)", "https://0.0.0.0/"),
    ("a cloud's metadata", "https://169.254.169.254/latest/meta-data/"),
    ("a cloud's host agent", "https://168.63.129.16/"),
    ("a private network", "https://10.0.0.1/"),
    ("a carrier's network", "https://100.64.0.1/"),
    ("a unique local address", "https://[fd00::1]/"),
    ("a link-local address with a zone", "https://[fe80::1%25eth0]/"),
    ("multicast", "https://224.0.0.1/"),
]

CALLBACKS = [
    *(
        Attack(f"Callback: {name}: `{url!r}`".replace("'", ""), "422 invalid", callback(url))
        for name, url in _LITERALS
    ),
    Attack(
        "Delivery: the name has a loopback address",
        "not sent: 127.0.0.1 is not a public address",
        delivery("https://hooks.example/", ["127.0.0.1"]),
    ),
    Attack(
        "Delivery: one of the name's addresses is private",
        "not sent: 10.0.0.1 is not a public address",
        delivery("https://hooks.example/", ["93.184.215.14", "10.0.0.1"]),
    ),
    Attack(
        "Delivery: a mapped address",
        "not sent: ::ffff:a9fe:a9fe is not a public address",
        delivery("https://hooks.example/", ["::ffff:169.254.169.254"]),
    ),
    Attack(
        "Delivery: the name changes its address (DNS rebinding)",
        "1 look-up, sent to the address that was checked",
        rebinding,
    ),
    Attack("Delivery: a redirect inside", "307, a failure; 1 request", redirect),
    Attack(
        "Delivery: a proxy in the environment, which would look up the name itself",
        "not sent: 127.0.0.1 is not a public address",
        proxy,
    ),
]


# Limits


async def request_rate(place: Place) -> str:
    asked = (place.ask("GET", "/sessions?limit=1", user="hasty") for _ in range(40))
    responses = await asyncio.gather(*asked)
    refused = [response for response in responses if response.status_code == 429]
    assert refused
    assert all(int(response.headers["retry-after"]) >= 1 for response in refused)
    return f"200, then {answer(refused[0])}"


async def sessions_at_once(place: Place) -> str:
    responses = await asyncio.gather(*(place.create("greedy") for _ in range(8)))
    answers = sorted(answer(response) for response in responses)
    return ", ".join(f"{answers.count(found)} get {found}" for found in dict.fromkeys(answers))


async def streams_at_once(place: Place) -> str:
    created = (await place.create("watcher")).json()["id"]
    headers = bearer(place.issuer.token("watcher"))
    async with AsyncExitStack() as stack:
        answers = []
        for _ in range(4):
            path = f"/sessions/{created}/events"
            response = await stack.enter_async_context(place.api.client.stream("GET", path, headers=headers))
            if response.is_error:
                await response.aread()
            answers.append(answer(response))
    return ", ".join(answers)


LIMITS = [
    Attack("Requests beyond the rate", "200, then 429 too-many-requests", request_rate),
    Attack("8 sessions at once, 5 allowed", "5 get 201, 3 get 429 too-many-sessions", sessions_at_once),
    Attack(
        "4 event streams, 2 allowed", "200, 200, 429 too-many-streams, 429 too-many-streams", streams_at_once
    ),
]

GROUPS = {
    "Authentication": AUTHENTICATION,
    "Ownership: Bob, a user, and what is Alice's": OWNERSHIP,
    "Input": INPUT,
    "Webhooks": CALLBACKS,
    "Limits": LIMITS,
}
ATTACKS = [attack for group in GROUPS.values() for attack in group]


async def _answer(asking: Awaitable[httpx.Response]) -> str:
    return answer(await asking)


def _part(value: Any) -> str:
    return _base64(json.dumps(value).encode())


def _base64(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).decode().rstrip("=")


@asynccontextmanager
async def placing(database: str, issuer: StandIn, **changes: Any) -> AsyncIterator[Place]:
    """An API on the database, and a session of Alice's."""
    settings = {"OUTWAKE_OIDC_ISSUER": issuer.url, "OUTWAKE_WEBHOOK_SECRET": WEBHOOK_SECRET, **changes}
    receiver = Receiver()
    async with (
        await psycopg.AsyncConnection.connect(database, autocommit=True) as conn,
        listening(receiver) as url,
        serving(database, **settings) as api,
    ):
        found = Place(api, issuer, conn, receiver=receiver, receiver_url=url)
        created = await found.create("alice", title="Secret")
        assert created.status_code == 201, created.text
        found.alice = created.json()["id"]
        yield found


@pytest.fixture(scope="module")
async def place(server: str, template: str) -> AsyncIterator[Place]:
    """One for the whole table, as an API that is attacked again and again."""
    with new_database(server, template) as name:
        async with (
            issuing() as issuer,
            placing(with_database(server, name), issuer, OUTWAKE_REQUEST_RATE=1000) as found,
        ):
            yield found


async def check(place: Place, attack: Attack) -> None:
    assert await attack.run(place) == attack.expected
    alive = await place.ask("GET", f"/sessions/{place.alice}", user="alice")
    assert alive.json()["title"] == "Secret"
    assert alive.json()["session_status"] == "active"


@pytest.mark.parametrize(
    "attack", [attack for attack in ATTACKS if attack not in LIMITS], ids=lambda attack: attack.name
)
async def test_attack(place: Place, attack: Attack) -> None:
    await check(place, attack)


@pytest.mark.parametrize("attack", LIMITS, ids=lambda attack: attack.name)
async def test_limit(database: str, attack: Attack) -> None:
    changes = {"OUTWAKE_REQUEST_RATE": 1, "OUTWAKE_MAX_SESSIONS": 5, "OUTWAKE_MAX_STREAMS": 2}
    async with issuing() as issuer, placing(database, issuer, **changes) as place:
        await check(place, attack)


def test_attacks_are_told_apart() -> None:
    names: Sequence[str] = [attack.name for attack in ATTACKS]
    assert len(set(names)) == len(names)


def table() -> str:
    lines = [f"\n{len(ATTACKS)} attacks.\n"]
    for title, attacks in GROUPS.items():
        lines += [f"\n### {title}\n\n| attack | answer |\n|---|---|\n"]
        lines += [f"| {attack.name} | {attack.expected} |\n" for attack in attacks]
    return "".join(lines) + "\n"


def with_table(page: str) -> str:
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}{table()}{END}{rest.partition(END)[2]}"


def test_the_page_shows_the_table() -> None:
    page = PAGE.read_text()
    assert page == with_table(page), "run: python -m tests.integration.test_attacks"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
