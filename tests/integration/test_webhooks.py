"""Webhooks, from the end of a turn to the receiver."""

import asyncio
import base64
import json
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from standardwebhooks import Webhook, WebhookVerificationError
from starlette.responses import PlainTextResponse, Response

from outwake.session.callback import Address
from outwake.settings import Settings
from outwake.worker.checked_transport import tls_context
from outwake.worker.handlers.webhook import post
from tests.conftest import Connect
from tests.support.api import Api, serving
from tests.support.certificate import certificate
from tests.support.http import Receiver, listening
from tests.support.manual_worker import ManualWorker
from tests.support.process import ROOT, running

SECRETS = ["whsec_" + base64.b64encode(bytes([n]) * 32).decode() for n in (1, 2)]
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def environment(**changes: str) -> dict[str, str]:
    return {"OUTWAKE_WEBHOOK_SECRET": SECRETS[0], "OUTWAKE_WEBHOOK_ALLOW": "127.0.0.1", **changes}


@pytest.fixture
async def hooked(database: str) -> AsyncIterator[Api]:
    """An API that takes callback URLs on loopback."""
    async with serving(database, **environment()) as api:
        yield api


async def deliveries(connect: Connect) -> list[dict[str, Any]]:
    """The payloads of the rows that deliver, by id."""
    conn = await connect()
    cursor = await conn.execute("SELECT payload FROM outbox WHERE topic = 'webhook.deliver' ORDER BY id")
    return [row[0] for row in await cursor.fetchall()]


async def types(connect: Connect) -> list[str]:
    return [payload["event"]["type"] for payload in await deliveries(connect)]


URL = "https://hooks.example/here"


async def test_the_end_of_a_turn_is_an_event_in_its_transaction(
    hooked: Api, manual: ManualWorker, connect: Connect
) -> None:
    created = await hooked.create(callback_url=URL, title="Fix it")
    assert created["callback_url"] == URL
    await manual.claim()
    async with manual.conn.transaction(force_rollback=True):
        await manual.complete()
    assert await types(connect) == []
    await manual.complete()
    first, second = await deliveries(connect)
    assert first["event"]["type"] == "prompt.succeeded"
    assert first["url"] == URL
    assert first["session_id"] == created["id"]
    assert first["event"]["data"] == {
        "session_id": created["id"],
        "title": "Fix it",
        "repo": "octo/tools",
        "branch": created["branch"],
        "inbox_status": "completed",
        "session_status": "active",
        "prompt": {"id": created["prompts"][0]["id"], "status": "succeeded", "reason": None},
    }
    assert second["event"]["type"] == "session.completed"
    assert "prompt" not in second["event"]["data"]
    assert first["id"] != second["id"]


async def test_whoever_ends_it_the_event_follows(hooked: Api, manual: ManualWorker, connect: Connect) -> None:
    await hooked.create(callback_url=URL)
    await manual.claim()
    await manual.fail("no such repository", permanent=True)
    assert await types(connect) == ["prompt.failed", "session.completed"]
    assert (await deliveries(connect))[0]["event"]["data"]["prompt"]["reason"] == "no such repository"

    cancelled = await hooked.create(callback_url=URL)
    await hooked.client.post(f"/sessions/{cancelled['id']}/cancel")
    assert (await types(connect))[2:] == ["prompt.cancelled", "session.completed"]

    await hooked.create(callback_url=URL)
    conn = await connect()
    await conn.execute(
        "UPDATE outbox SET state = 'cancelled' WHERE state = 'ready' AND topic = 'session.run'"
    )
    assert (await types(connect))[4:] == ["prompt.cancelled", "session.completed"]

    deleted = await hooked.create(callback_url=URL)
    await conn.execute("DELETE FROM outbox WHERE payload ->> 'session_id' = %s", (deleted["id"],))
    assert (await types(connect))[6:] == ["prompt.cancelled", "session.completed"]

    archived = await hooked.create(callback_url=URL)
    await hooked.client.delete(f"/sessions/{archived['id']}")
    assert (await types(connect))[8:] == ["prompt.cancelled", "session.completed", "session.archived"]


async def test_the_pages_event_has_the_form_of_real_ones(
    hooked: Api, manual: ManualWorker, connect: Connect
) -> None:
    page = (ROOT / "docs" / "webhooks.md").read_text()
    [shown] = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    await hooked.create(callback_url=URL)
    await manual.claim()
    await manual.fail("x", permanent=True)
    real = (await deliveries(connect))[0]["event"]
    told = json.loads(shown)
    assert told["type"] == real["type"]
    assert told["data"].keys() == real["data"].keys()
    assert told["data"]["prompt"].keys() == real["data"]["prompt"].keys()


async def test_a_turn_that_is_followed_by_another_does_not_complete_the_session(
    hooked: Api, manual: ManualWorker, connect: Connect
) -> None:
    created = await hooked.create(callback_url=URL)
    await hooked.client.post(f"/sessions/{created['id']}/prompts", json={"prompt": "More"})
    await manual.claim()
    await manual.complete()
    assert await types(connect) == ["prompt.succeeded"]
    await manual.claim()
    await manual.fail("later")
    assert await types(connect) == ["prompt.succeeded"]  # it will be tried again: no end


async def test_without_a_callback_nothing_is_told(
    hooked: Api, manual: ManualWorker, connect: Connect
) -> None:
    created = await hooked.create()
    assert created["callback_url"] is None
    await manual.claim()
    await manual.complete()
    await hooked.client.delete(f"/sessions/{created['id']}")
    assert await types(connect) == []


async def test_without_a_secret_no_callback_is_taken(api: Api) -> None:
    asked = {"repo": "octo/tools", "target_branch": "main", "callback_url": URL}
    refused = await api.client.post("/sessions", json=asked)
    assert refused.status_code == 422
    assert "OUTWAKE_WEBHOOK_SECRET" in refused.json()["errors"][0]["detail"]


async def test_a_worker_delivers_signed_in_order_and_again(
    hooked: Api, manual: ManualWorker, database: str, connect: Connect
) -> None:
    receiver = Receiver(
        answers=[Response(status_code=500), Response(status_code=307, headers={"Location": "/x"})]
    )
    async with listening(receiver) as url:
        created = await hooked.client.post(
            "/sessions",
            json={
                "repo": "octo/tools",
                "target_branch": "main",
                "prompt": "Größe",
                "callback_url": f"{url}/hook?a=b",
            },
            headers={"traceparent": TRACE},
        )
        await manual.claim()
        await manual.complete()
        conn = await connect()
        variables = environment(
            DATABASE_URL=database, OUTWAKE_LOG_LEVEL="debug", OUTWAKE_WEBHOOK_SECRET=" ".join(SECRETS)
        )
        async with running("worker", "--topics", "webhook.deliver", env=variables) as worker:
            for status in (500, 307):
                answered = await worker.event("webhook_answered", status=status)
                await worker.event("ended", after=answered)
                await conn.execute("UPDATE outbox SET available_at = clock_timestamp() WHERE state = 'ready'")
            first = await worker.event("webhook_answered", status=204)
            await worker.event("webhook_answered", status=204, after=first)
    assert [request.path for request in receiver.received] == ["/hook"] * 4
    bodies = [json.loads(request.body) for request in receiver.received]
    assert [body["type"] for body in bodies] == ["prompt.succeeded"] * 3 + ["session.completed"]
    ids = [request.headers["webhook-id"] for request in receiver.received]
    assert ids[0] == ids[1] == ids[2] != ids[3]
    for request in receiver.received:
        assert len(request.headers["webhook-signature"].split()) == 2
        for secret in SECRETS:
            Webhook(secret).verify(request.body, request.headers)
        with pytest.raises(WebhookVerificationError):
            Webhook(SECRETS[0]).verify(request.body + b" ", request.headers)
        assert request.headers["traceparent"].split("-")[1] == TRACE.split("-")[1]
        assert request.headers["content-type"] == "application/json"
    assert bodies[0]["data"]["title"] == created.json()["title"] == "Größe"


@pytest.mark.parametrize(
    ("answer", "state", "error", "kept"),
    [
        (Response(status_code=410), "dead", "answered 410", False),
        (PlainTextResponse("a secret of the inside", 404), "ready", "answered 404", True),
        (Response(status_code=429, headers={"Retry-After": "1800"}), "ready", "answered 429", True),
    ],
    ids=["gone", "not found", "too many"],
)
async def test_what_an_answer_leads_to(
    hooked: Api,
    manual: ManualWorker,
    database: str,
    connect: Connect,
    answer: Response,
    state: str,
    error: str,
    kept: bool,
) -> None:
    async with listening(Receiver(answers=[answer])) as url:
        await hooked.create(callback_url=url)
        await manual.claim()
        await manual.complete()
        variables = environment(DATABASE_URL=database, OUTWAKE_LOG_LEVEL="debug")
        async with running("worker", "--topics", "webhook.deliver", env=variables) as worker:
            await worker.event("ended")
            row = await (
                await (await connect()).execute(
                    "SELECT state, errors -> -1 ->> 'error', available_at > now() + interval '25 minutes',"
                    " (SELECT callback_url FROM session) FROM outbox"
                    " WHERE topic = 'webhook.deliver' ORDER BY id LIMIT 1"
                )
            ).fetchone()
    assert row is not None
    assert row[0] == state
    assert row[1].startswith(error)
    assert "inside" not in row[1]
    assert row[2] == ("429" in error)
    assert (row[3] is not None) == kept


async def test_a_forbidden_address_is_dead_at_once(
    hooked: Api, manual: ManualWorker, database: str, connect: Connect
) -> None:
    receiver = Receiver()
    async with listening(receiver) as url:
        await hooked.create(callback_url=url)
        await manual.claim()
        await manual.complete()
        variables = environment(
            DATABASE_URL=database, OUTWAKE_LOG_LEVEL="debug", OUTWAKE_WEBHOOK_ALLOW="10.0.0.0/8"
        )
        async with running("worker", "--topics", "webhook.deliver", env=variables) as worker:
            await worker.event("ended", state="dead")
    assert receiver.received == []


# TLS, with an authority of its own


@asynccontextmanager
async def tls_server(own: Path, seen: list[str | None]) -> AsyncIterator[int]:
    """Answers 204 to anything; notes the names that clients ask for. Gives its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own)
    context.sni_callback = lambda _, name, __: seen.append(name)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        seen.append(next(line[6:].decode() for line in head.split(b"\r\n") if line.startswith(b"Host: ")))
        writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def test_the_certificate_is_that_of_the_name_though_the_address_is_pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority, own = certificate(tmp_path, "hooks.example")
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    tls_context.cache_clear()
    settings = Settings.model_validate({"DATABASE_URL": "x", **environment()})
    seen: list[str | None] = []

    async def resolve(host: str, port: int) -> list[Address]:
        return [ip_address("127.0.0.1")]

    async with tls_server(own, seen) as port:
        url = f"https://hooks.example:{port}/"
        assert (await post(url, "msg_1", b"{}", None, settings, resolve))[0] == 204
        assert seen == ["hooks.example", f"hooks.example:{port}"]
        with pytest.raises(httpx.ConnectError, match=r"[Hh]ostname mismatch"):
            await post(f"https://other.example:{port}/", "msg_1", b"{}", None, settings, resolve)
    tls_context.cache_clear()


async def test_a_receiver_that_never_ends_its_answer_does_not_hold_us(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its head is enough; one that does not send that is cut off."""
    monkeypatch.setattr("outwake.worker.handlers.webhook.TIMEOUT", 0.2)
    settings = Settings.model_validate({"DATABASE_URL": "x", **environment()})

    async def dawdle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(-1)
        writer.close()

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\nx")
        await reader.read(-1)
        writer.close()

    async with await asyncio.start_server(dawdle, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises((TimeoutError, httpx.TimeoutException)):
            await post(f"http://127.0.0.1:{port}/", "msg_1", b"{}", None, settings)
    monkeypatch.undo()
    async with await asyncio.start_server(endless, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        assert (await post(f"http://127.0.0.1:{port}/", "msg_1", b"{}", None, settings))[0] == 200


async def test_the_event_and_id_survive_a_retry_by_hand(
    hooked: Api, manual: ManualWorker, connect: Connect
) -> None:
    await hooked.create(callback_url=URL)
    await manual.claim()
    await manual.complete()
    before = await deliveries(connect)
    conn = await connect()
    await conn.execute("UPDATE outbox SET state = 'cancelled' WHERE topic = 'webhook.deliver'")
    await conn.execute("SELECT outbox_retry(id) FROM outbox WHERE topic = 'webhook.deliver'")
    assert await deliveries(connect) == before
    assert all(UUID(payload["id"].removeprefix("msg_")) for payload in before)
