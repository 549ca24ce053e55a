"""The relay: real workers, a real nats-server with JetStream."""

import asyncio
import base64
import json
import re
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from textwrap import dedent
from typing import Any

import nkeys
import pytest

from outwake import enqueue
from tests.conftest import Connect
from tests.support.certificate import certificate
from tests.support.database import new_database, set_search_path
from tests.support.nats import NatsServer, nats_server
from tests.support.process import ROOT, Event, Process, running
from tests.support.proxy import Proxy
from tests.support.server import with_database
from tests.support.steps import Connection, one, until
from tests.support.waits import awaiting

TOPICS = "billing.paid,billing.refunded"
SUBJECT = "outwake.billing.paid"
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture
async def nats(tmp_path: Path) -> AsyncIterator[NatsServer]:
    async with nats_server(tmp_path) as server:
        yield server


def relaying(database: str, url: str, **env: str | None) -> AbstractAsyncContextManager[Process]:
    """The `worker` command with the relay."""
    return running(
        "worker",
        env={
            "DATABASE_URL": database,
            "OUTWAKE_RELAY_URL": url,
            "OUTWAKE_RELAY_TOPICS": TOPICS,
            "OUTWAKE_LOG_LEVEL": "debug",
            "OUTWAKE_DRAIN_GRACE": "0",
            **env,
        },
    )


async def completed(worker: Process, rows: set[int]) -> None:
    """Return when the worker has ended all these rows as done."""
    event: Event | None = None
    while rows:
        event = await worker.event("completed", after=event)
        rows = rows - set(event["rows"])


async def row(conn: Connection, row_id: int) -> dict[str, Any]:
    found: dict[str, Any] = await one(conn, "SELECT to_jsonb(o) FROM outbox AS o WHERE id = %s", row_id)
    return found


async def test_rows_reach_the_stream_in_the_order_of_their_keys(
    database: str, connect: Connect, nats: NatsServer
) -> None:
    await nats.add_stream()
    conn = await connect()
    rows: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    for number in range(20):
        for key, ids in rows.items():
            topic = TOPICS.split(",")[number % 2]
            ids.append(await enqueue(conn, topic, {"n": number}, ordering_key=key))
    async with relaying(database, nats.url) as worker:
        await completed(worker, {row_id for ids in rows.values() for row_id in ids})
        worker.send(signal.SIGTERM)
        assert await worker.ended() == 0
        assert [event["event"] for event in worker.events].count("relay_connected") == 1
        await worker.event("relay_disconnected", error=None)
    messages = await nats.messages(60)
    assert await nats.count() == 60
    for key, ids in rows.items():
        own = [m for m in messages if (m.headers or {})["Outwake-Ordering-Key"] == key]
        assert [int((m.headers or {})["Outwake-Row"]) for m in own] == ids
        assert [json.loads(m.data)["n"] for m in own] == list(range(20))
        assert [m.subject for m in own] == [f"outwake.{TOPICS.split(',')[n % 2]}" for n in range(20)]


async def test_what_a_consumer_sees(database: str, connect: Connect, nats: NatsServer) -> None:
    await nats.add_stream()
    conn = await connect()
    payload = '{"sum": 12345678901234567890.123456789012345678901, "huge": 1e400, "text": "ä\\n"}'
    row_id = await one(
        conn,
        "INSERT INTO outbox (topic, payload, ordering_key, traceparent, created_at)"
        " VALUES ('billing.paid', %s::jsonb, E' ü\\n100%%', %s, '2026-11-24 12:00:00.000001+02')"
        " RETURNING id",
        payload,
        TRACE,
    )
    async with relaying(database, nats.url, OUTWAKE_RELAY_PREFIX="outwake.eu") as worker:
        await completed(worker, {row_id})
    [message] = await nats.messages(1)
    assert message.subject == "outwake.eu.billing.paid"
    assert message.data.decode() == await one(conn, "SELECT payload::text FROM outbox WHERE id = %s", row_id)
    cluster, oid = await (
        await conn.execute(
            "SELECT system_identifier, oid FROM pg_control_system(), pg_database"
            " WHERE datname = current_database()"
        )
    ).fetchone() or (None, None)
    assert message.headers == {
        "Nats-Msg-Id": f"{cluster}.{oid}.{row_id}.2026-11-24T10:00:00.000001Z",
        "Outwake-Row": str(row_id),
        "Outwake-Attempt": "1",
        "Outwake-Created-At": "2026-11-24T10:00:00.000001Z",
        "Outwake-Ordering-Key": "%20%C3%BC%0A100%25",
        "traceparent": TRACE,
    }


async def test_the_page_sets_it_up(database: str, connect: Connect, nats: NatsServer, tmp_path: Path) -> None:
    """Its commands as they are, but for the port."""
    page = (ROOT / "docs" / "relay.md").read_text()
    fenced = re.findall(r"^   ```(\w*)\n(.*?)^   ```", page, re.DOTALL | re.MULTILINE)
    (_, program), (_, shell), (_, statement) = [(name, dedent(text)) for name, text in fenced]
    (tmp_path / "stream.py").write_text(program)
    async with running(sys.executable, tmp_path / "stream.py", env={"NATS_URL": nats.url}) as process:
        assert await process.ended() == 0, process.stderr
    exported = dict(re.findall(r"^export (\w+)=(.*)$", shell, re.MULTILINE))
    assert exported.pop("OUTWAKE_RELAY_URL") == "nats://127.0.0.1:4222"
    set_search_path(database, "public")
    await (await connect()).execute(statement.encode())
    async with relaying(database, nats.url, **exported) as worker:
        await worker.event("relayed", stream="OUTWAKE", seq=1)
    [message] = await nats.messages(1)
    assert (message.subject, message.data) == (SUBJECT, b'{"sum": 12.50}')
    named = set(re.findall(r"^\| `([\w-]+)` \|", page.partition("## What a consumer sees")[2], re.MULTILINE))
    assert set(message.headers or {}) == named - {"traceparent"}
    async with nats.jetstream() as stream:
        assert (await stream.stream_info("OUTWAKE")).config.duplicate_window == 900


async def hold_completion(conn: Connection) -> None:
    """Who completes a row waits for the lock that `conn` now has."""
    await conn.execute(
        "CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN PERFORM pg_advisory_xact_lock_shared(7, 7); RETURN new; END'"
    )
    await conn.execute(
        "CREATE TRIGGER hold BEFORE UPDATE ON outbox FOR EACH ROW WHEN (new.state = 'done')"
        " EXECUTE FUNCTION hold()"
    )
    await conn.execute("SELECT pg_advisory_lock(7, 7)")


async def test_a_crash_between_publish_and_complete_leaves_one_message(
    database: str, connect: Connect, nats: NatsServer
) -> None:
    await nats.add_stream()
    conn = await connect()
    await hold_completion(conn)
    row_id = await enqueue(conn, "billing.paid", {"n": 1})
    waiting = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objid = 7 AND NOT granted"
    async with relaying(database, nats.url, OUTWAKE_LEASE="600") as first:
        await first.event("relayed", outbox_id=row_id, stream="S", seq=1, duplicate=False)
        await until(conn, f"SELECT exists ({waiting})")
        first.kill()
        await first.ended()
        # Its statement would go on in the server, and commit, when the lock is free.
        await conn.execute(f"SELECT pg_terminate_backend(pid) FROM ({waiting}) AS w".encode())
        await until(conn, f"SELECT NOT exists ({waiting})")
        await conn.execute("SELECT pg_advisory_unlock(7, 7)")
        assert (await row(conn, row_id))["state"] == "running"
        await conn.execute("UPDATE worker SET lease_until = clock_timestamp()")  # ten minutes later
    async with relaying(database, nats.url, OUTWAKE_LEASE="3") as second:
        await second.event("relayed", outbox_id=row_id, seq=1, duplicate=True)
        await completed(second, {row_id})
    assert await nats.count() == 1
    [message] = await nats.messages(1)
    assert (message.headers or {})["Outwake-Attempt"] == "1"
    ended = await row(conn, row_id)
    assert ended["state"] == "done"
    assert ended["attempt"] >= 2


async def test_a_lost_acknowledgement_leaves_one_message(
    database: str, connect: Connect, nats: NatsServer
) -> None:
    await nats.add_stream()
    conn = await connect()
    proxy = Proxy("nats", ("127.0.0.1", nats.port))
    await proxy.open()
    try:
        async with relaying(database, f"nats://127.0.0.1:{proxy.port}") as worker:
            await completed(worker, {await enqueue(conn, "billing.paid", {"n": 1})})
            [connection] = proxy.connections
            connection.swallow_down = True
            row_id = await enqueue(conn, "billing.paid", {"n": 2})
            await worker.event("ended", outbox_id=row_id, state="ready", reason="not acknowledged in 5 s")
            await proxy.heal()
            await completed(worker, {row_id})
            await worker.event("relayed", outbox_id=row_id, duplicate=True)
    finally:
        await proxy.close()
    assert await nats.count() == 2


async def test_an_outage_loses_nothing_and_fails_nothing(
    database: str, connect: Connect, tmp_path: Path
) -> None:
    """Neither when it is down from the start, nor when it goes down later."""
    conn = await connect()
    async with nats_server(tmp_path) as nats, relaying(database, nats.url) as worker:
        await nats.add_stream()
        await nats.kill()
        rows = [await enqueue(conn, "billing.paid", {"n": n}, ordering_key="a") for n in range(2)]
        rows += [await enqueue(conn, "billing.paid", {"n": n}) for n in range(2, 4)]
        for row_id in (rows[0], *rows[2:]):
            ended = await worker.event("ended", outbox_id=row_id, state="handed back")
            assert ended["reason"].startswith("NATS cannot be reached: ")
            assert "Connection refused" in ended["reason"]
        await nats.start()
        await completed(worker, set(rows))
        assert await one(conn, "SELECT max(failures) FROM outbox") == 0
        assert (await row(conn, rows[0]))["attempt"] >= 2

        await nats.kill()
        await worker.event("relay_disconnected")
        rows = [await enqueue(conn, "billing.paid", {"n": n}, ordering_key="a") for n in range(4, 6)]
        await worker.event("ended", outbox_id=rows[0], state="handed back")
        await nats.start()
        await completed(worker, set(rows))
        assert await one(conn, "SELECT max(failures) FROM outbox") == 0
        messages = await nats.messages(6)
        assert await nats.count() == 6
    sent = [json.loads(message.data)["n"] for message in messages]
    assert sorted(sent) == list(range(6))
    assert [n for n in sent if n not in (2, 3)] == [0, 1, 4, 5]


async def test_a_missing_stream_is_told_and_retried(
    database: str, connect: Connect, nats: NatsServer
) -> None:
    conn = await connect()
    row_id = await enqueue(conn, "billing.paid", {"n": 1})
    reason = f"no stream takes the subject {SUBJECT}"
    async with relaying(database, nats.url) as worker:
        await worker.event("ended", outbox_id=row_id, state="ready", reason=reason)
        await nats.add_stream()
        await completed(worker, {row_id})
    ended = await row(conn, row_id)
    assert (ended["state"], ended["failures"]) == ("done", ended["attempt"] - 1)
    assert {error["error"] for error in ended["errors"]} == {reason}
    assert await nats.count() == 1


async def test_a_row_that_no_stream_ever_takes_dies(
    database: str, connect: Connect, nats: NatsServer
) -> None:
    conn = await connect()
    row_id = await enqueue(conn, "billing.paid", {"n": 1}, max_attempts=2)
    async with relaying(database, nats.url) as worker:
        await worker.event("ended", outbox_id=row_id, attempt=2, state="dead")


@pytest.mark.parametrize("limit", ["server", "stream"])
async def test_a_message_too_large_is_dead_at_once(
    database: str, connect: Connect, nats: NatsServer, limit: str
) -> None:
    """With the connection, and what else is sent on it, unharmed."""
    await nats.add_stream(max_msg_size=1000 if limit == "stream" else -1)
    conn = await connect()
    # The server's limit is for body and headers: the body alone would pass.
    length = 1100 if limit == "stream" else 2**20 - len('{"x": ""}')
    rows = [await enqueue(conn, "billing.paid", {"x": text}) for text in ("y" * length, "y")]
    async with relaying(database, nats.url) as worker:
        ended = await worker.event("ended", outbox_id=rows[0], attempt=1, state="dead")
        await completed(worker, {rows[1]})
        assert [event["event"] for event in worker.events].count("relay_connected") == 1
    assert ended["reason"].startswith("the message is too large: ")
    [error] = (await row(conn, rows[0]))["errors"]
    assert error["error"] == ended["reason"]
    assert ("1048576" in error["error"]) == (limit == "server")
    assert await nats.count() == 1


async def test_no_row_is_taken_for_another(
    server: str, template: str, nats: NatsServer, connect: Connect
) -> None:
    """Not one of the same id and time in another database, nor one that has the id of a row before."""
    await nats.add_stream()
    for _ in range(2):
        with new_database(server, template) as name:
            url = with_database(server, name)
            conn = await connect(url)
            insert = (
                "INSERT INTO outbox (topic, created_at) VALUES ('billing.paid', '2026-11-24') RETURNING id"
            )
            row_id = await one(conn, insert)
            async with relaying(url, nats.url) as worker:
                await completed(worker, {row_id})
                await conn.execute("TRUNCATE outbox RESTART IDENTITY")
                assert await enqueue(conn, "billing.paid") == row_id
                await worker.event("relayed", outbox_id=row_id, duplicate=False, after=worker.events[-1])
    assert await nats.count() == 4


SECRET = "s3cr3t-of-the-relay"


async def test_a_token_is_sent_and_never_shown(database: str, connect: Connect, tmp_path: Path) -> None:
    conn = await connect()
    async with nats_server(tmp_path, "--auth", SECRET) as nats:
        await nats.add_stream({"token": SECRET})
        row_id = await enqueue(conn, "billing.paid", {"n": 1})
        for token, state in ((f"not-{SECRET}", "handed back"), (SECRET, "done")):
            async with relaying(database, f"nats://{token}@127.0.0.1:{nats.port}") as worker:
                if state == "done":
                    await completed(worker, {row_id})
                else:
                    ended = await worker.event("ended", outbox_id=row_id, state=state)
                    assert "Authorization Violation" in ended["reason"]
            assert SECRET not in "\n".join([*worker.stdout, *worker.stderr])


def signed(signer: bytes, subject: bytes, kind: str, **nats: Any) -> str:
    """A NATS JWT: who holds the seed `signer` vouches for the public key of the seed `subject`."""
    keys = nkeys.from_seed(bytearray(signer)), nkeys.from_seed(bytearray(subject))
    claims = {
        "jti": secrets.token_hex(8),
        "iat": int(time.time()),
        "iss": keys[0].public_key.decode(),
        "sub": keys[1].public_key.decode(),
        "nats": {"type": kind, "version": 2, **nats},
    }
    parts = [json.dumps(part).encode() for part in ({"typ": "JWT", "alg": "ed25519-nkey"}, claims)]
    text = ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts)
    return f"{text}.{base64.urlsafe_b64encode(keys[0].sign(text.encode())).decode().rstrip('=')}"


async def test_a_credentials_file_is_read_for_each_connection(
    database: str, connect: Connect, tmp_path: Path
) -> None:
    operator, system, account, user, other = (
        bytes(nkeys.encode_seed(secrets.token_bytes(32), kind))
        for kind in (
            nkeys.PREFIX_BYTE_OPERATOR,
            nkeys.PREFIX_BYTE_ACCOUNT,
            nkeys.PREFIX_BYTE_ACCOUNT,
            nkeys.PREFIX_BYTE_USER,
            nkeys.PREFIX_BYTE_USER,
        )
    )
    no_limit = dict.fromkeys(("subs", "data", "payload", "conn", "leaf"), -1)
    storage = dict.fromkeys(("mem_storage", "disk_storage", "streams", "consumer"), -1)
    user_jwt = signed(account, user, "user", **dict.fromkeys(("subs", "data", "payload"), -1))
    accounts = {
        nkeys.from_seed(bytearray(seed)).public_key.decode(): signed(operator, seed, "account", limits=limits)
        for seed, limits in ((system, no_limit), (account, {**no_limit, **storage}))
    }
    preload = "\n".join(f"{name}: {jwt}" for name, jwt in accounts.items())
    (tmp_path / "nats.conf").write_text(
        f"operator: {signed(operator, operator, 'operator')}\n"
        f"system_account: {next(iter(accounts))}\n"
        f"resolver: MEMORY\nresolver_preload: {{\n{preload}\n}}\n"
    )
    good, used = tmp_path / "good.creds", tmp_path / "used.creds"
    form = (
        "-----BEGIN NATS USER JWT-----\n{}\n------END NATS USER JWT------\n\n"
        "-----BEGIN USER NKEY SEED-----\n{}\n------END USER NKEY SEED------\n"
    )
    good.write_text(form.format(user_jwt, user.decode()))
    used.write_text(form.format(user_jwt, other.decode()))  # the key of somebody else
    conn = await connect()
    async with nats_server(tmp_path, "-c", tmp_path / "nats.conf") as nats:
        await nats.add_stream({"user_credentials": str(good)})
        row_id = await enqueue(conn, "billing.paid", {"n": 1})
        async with relaying(database, nats.url, OUTWAKE_RELAY_CREDENTIALS=str(used)) as worker:
            ended = await worker.event("ended", outbox_id=row_id, state="handed back")
            assert "Authorization Violation" in ended["reason"]
            used.write_text("not now")
            row_id = await enqueue(conn, "billing.paid", {"n": 2})
            ended = await worker.event("ended", outbox_id=row_id, state="handed back", after=ended)
            assert "has no 'BEGIN NATS USER JWT'" in ended["reason"]
            used.write_text(form.format(user_jwt, "SUNOSEED"))
            row_id = await enqueue(conn, "billing.paid", {"n": 3})
            await worker.event("ended", outbox_id=row_id, state="handed back")
            good.replace(used)
            await completed(worker, {row_id - 2, row_id - 1, row_id})
        printed = "\n".join(worker.stderr)
    assert all(secret not in printed for secret in (user_jwt, user.decode(), other.decode()))


async def test_what_the_server_forbids_is_told(database: str, connect: Connect, tmp_path: Path) -> None:
    config = tmp_path / "nats.conf"
    config.write_text(
        f'authorization {{ users = [{{user: "u", password: "{SECRET}",'
        ' permissions: {publish: {deny: "outwake.billing.refunded"}}}] }'
    )
    conn = await connect()
    async with nats_server(tmp_path, "-c", config) as nats:
        await nats.add_stream({"user": "u", "password": SECRET})
        rows = [await enqueue(conn, topic, {"n": 1}) for topic in TOPICS.split(",")]
        async with relaying(database, f"nats://u:{SECRET}@127.0.0.1:{nats.port}") as worker:
            await completed(worker, {rows[0]})
            ended = await worker.event("ended", outbox_id=rows[1], state="ready")
        assert "permissions violation for publish" in ended["reason"]
        assert SECRET not in "\n".join(worker.stderr)


async def test_tls(database: str, connect: Connect, tmp_path: Path) -> None:
    authority, own = certificate(tmp_path, "localhost")
    conn = await connect()
    arguments = ("--tls", "--tlscert", own, "--tlskey", own)
    async with nats_server(tmp_path, *arguments) as nats:
        row_id = await enqueue(conn, "billing.paid", {"n": 1})
        url = f"tls://localhost:{nats.port}"
        async with relaying(database, url) as worker:
            ended = await worker.event("ended", outbox_id=row_id, state="handed back")
            assert "certificate verify failed" in ended["reason"]
        async with relaying(database, url, SSL_CERT_FILE=str(authority)) as worker:
            await worker.event("ended", outbox_id=row_id, state="ready")  # there is no stream
            await worker.event("relay_connected")


async def test_tls_is_not_given_up_for_a_server_without(database: str, connect: Connect) -> None:
    """The server is one that says what a plain nats-server says. It is not told the password."""
    heard = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b'INFO {"server_id":"x","version":"2.12.0","max_payload":1048576,"auth_required":true}\r\n'
        )
        got = await reader.read()
        if not heard.done():
            heard.set_result(got)
        writer.close()

    conn = await connect()
    row_id = await enqueue(conn, "billing.paid", {"n": 1})
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as plain:
        port = plain.sockets[0].getsockname()[1]
        async with relaying(database, f"tls://u:{SECRET}@127.0.0.1:{port}") as worker:
            ended = await worker.event("ended", outbox_id=row_id, state="handed back")
        assert "secure connection not available" in ended["reason"]
        async with awaiting("the client to hang up"):
            assert await heard == b""


async def test_a_worker_that_relays_nothing_does_not_load_the_client(database: str) -> None:
    code = "import sys, outwake.worker.cli, outwake.worker.engine.worker; sys.exit('nats' in sys.modules)"
    async with running(sys.executable, "-c", code) as process:
        assert await process.ended() == 0


def without_client(directory: Path) -> Mapping[str, str]:
    """As if nats-py were not installed."""
    (directory / "nats").mkdir()
    (directory / "nats" / "__init__.py").write_text("raise ModuleNotFoundError('no nats', name='nats')\n")
    return {"PYTHONPATH": f"{directory}:{ROOT}"}


async def refusal(database: str, env: Mapping[str, str | None]) -> str:
    """The one line that a worker says which does not start."""
    async with relaying(database, "nats://127.0.0.1:4222", **env) as process:
        assert await process.ended() == 2
    [line] = process.stderr
    return line


async def test_it_is_an_extra(database: str, tmp_path: Path) -> None:
    env = without_client(tmp_path)
    assert await refusal(database, env) == (
        "worker: OUTWAKE_RELAY_TOPICS is set, but nats is missing: pip install 'outwake[relay]'"
    )
    async with relaying(database, "", OUTWAKE_RELAY_TOPICS="", **env) as worker:
        await worker.event("parked")


@pytest.mark.parametrize(
    ("env", "line"),
    [
        (
            {"OUTWAKE_RELAY_TOPICS": "billing.paid,webhook.deliver"},
            "OUTWAKE_RELAY_TOPICS: webhook.deliver has a handler already",
        ),
        ({"OUTWAKE_RELAY_URL": None}, "OUTWAKE_RELAY_URL: is not set, and OUTWAKE_RELAY_TOPICS is"),
        (
            {"OUTWAKE_RELAY_URL": f"http://{SECRET}@host"},
            "OUTWAKE_RELAY_URL: must be nats://host:port or tls://host:port, or several, separated by commas",
        ),
        (
            {"OUTWAKE_RELAY_CREDENTIALS": "/nowhere/u.creds"},
            "OUTWAKE_RELAY_CREDENTIALS: /nowhere/u.creds: No such file or directory",
        ),
        (
            {"OUTWAKE_RELAY_CREDENTIALS": "/dev/null"},
            "OUTWAKE_RELAY_CREDENTIALS: /dev/null: has no 'BEGIN NATS USER JWT'",
        ),
    ],
)
async def test_a_wrong_setting_is_one_line(database: str, env: Mapping[str, str | None], line: str) -> None:
    assert await refusal(database, env) == f"worker: {line}"
