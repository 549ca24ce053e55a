"""Several hosts in the URL: one that does not answer, and an old primary that comes back."""

import asyncio
import socket
import subprocess
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool

from outwake import _hosts
from outwake.connect import ServerConnection, check, connect, conninfo
from outwake.embedded.postgres import EmbeddedPostgres
from tests.support.steps import one

LEASE = timedelta(seconds=6)


async def test_a_host_that_does_not_answer_costs_its_timeout_once(server: str) -> None:
    """It accepts connections, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.setblocking(False)
        address = psycopg.conninfo.conninfo_to_dict(server)
        url = psycopg.conninfo.make_conninfo(
            server, host=f"127.0.0.1,{address['host']}", port=f"{silent.getsockname()[1]},{address['port']}"
        )
        for _ in range(3):
            async with await connect(url, "test", LEASE) as conn:
                assert await one(conn, "SELECT 1") == 1
        tried = 0
        try:
            while True:
                silent.accept()[0].close()
                tried += 1
        except BlockingIOError:
            pass
        assert tried == 1


def become_copy(directory: Path, of: Path) -> None:
    """With its owner, which is another one where the tests run as root."""
    for path in directory.iterdir():
        subprocess.run(["rm", "-rf", path], check=True)
    subprocess.run(["cp", "-a", f"{of}/.", directory], check=True)


async def test_an_old_primary_that_comes_back_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. The standby of A is promoted. 2. We use it. 3. A comes back, and takes writes."""
    monkeypatch.setattr(_hosts, "_newest", {})
    monkeypatch.setattr(_hosts, "_answered", {})
    old = EmbeddedPostgres(tmp_path / "old", settings={"fsync": "off"})
    new = EmbeddedPostgres(tmp_path / "new", settings={"fsync": "off"})
    try:
        await asyncio.to_thread(old.start)
        await asyncio.to_thread(old.stop)
        await asyncio.to_thread(new.start)
        await asyncio.to_thread(new.stop)
        await asyncio.to_thread(become_copy, tmp_path / "new", tmp_path / "old")
        await asyncio.to_thread(old.start)
        info = conninfo(old.url, "test", LEASE)
        async with AsyncConnectionPool[ServerConnection](
            info, connection_class=ServerConnection, check=check, min_size=1, open=False, timeout=1
        ) as pool:
            async with pool.connection() as pooled:
                assert await one(pooled, "SELECT 1") == 1
            (tmp_path / "new" / "standby.signal").touch()
            await asyncio.to_thread(new.start)
            async with await connect(new.url, "test", LEASE) as standby:
                assert await one(standby, "SELECT pg_is_in_recovery()")
                assert await one(standby, "SELECT pg_promote()")
            async with await connect(new.url, "test", LEASE) as primary:
                assert primary.origin.timeline == 2
            with pytest.raises(psycopg.OperationalError, match="replaced"):
                await connect(old.url, "test", LEASE)
            assert not pooled.usable
            with pytest.raises(psycopg.OperationalError):
                async with pool.connection():
                    pass
        both = psycopg.conninfo.make_conninfo(
            old.url, host="127.0.0.1,127.0.0.1", port=f"{old.port},{new.port}"
        )
        async with await connect(both, "test", LEASE) as conn:
            assert conn.info.port == new.port
    finally:
        for postgres in (old, new):
            await asyncio.to_thread(postgres.remove)
