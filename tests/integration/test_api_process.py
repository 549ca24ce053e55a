"""The process `outwake api`: its log, its signals, and when it refuses to start."""

import json
import signal
import sys
from contextlib import AbstractAsyncContextManager

import httpx
import pytest

from tests.support.process import Process, running

CODE = "from outwake.cli import main; main(['api'])"


def api(database: str, **env: str) -> AbstractAsyncContextManager[Process]:
    return running(sys.executable, "-c", CODE, env={"DATABASE_URL": database, "OUTWAKE_PORT": "0", **env})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_ends_open_streams_and_the_process(database: str, number: signal.Signals) -> None:
    async with api(database) as process:
        ready = await process.event("api_ready")
        url = f"http://{ready['host']}:{ready['port']}"
        async with httpx.AsyncClient(base_url=url) as client:
            asked = {"repo": "octo/tools", "target_branch": "main", "prompt": "hush hush"}
            created = (await client.post("/sessions", json=asked)).json()
            path = f"/sessions/{created['id']}/events"
            async with client.stream("GET", path) as response:
                lines = response.aiter_lines()
                assert await anext(lines) == "retry: 1000"
                process.send(number)
                async for _ in lines:
                    pass
            assert await process.ended() == 0
        followed = await process.event("request", route="/sessions/{id:uuid}/events")
        assert followed["session"] == created["id"]
        assert followed["status"] == 200
        assert {"method", "duration_ms"} <= followed.keys()
        await process.event("api_stopped")
        assert "hush" not in "".join(process.stderr)


async def test_start_says_that_there_is_no_authentication(database: str) -> None:
    async with api(database) as process:
        warning = await process.event("dev_identity")
        assert warning["level"] == "warning"
        assert "no authentication" in warning["warning"]
        process.send(signal.SIGTERM)  # in the midst of its start
        assert await process.ended() == 0


async def test_host_that_strangers_reach_is_refused(database: str) -> None:
    async with api(database, OUTWAKE_HOST="0.0.0.0") as process:
        assert await process.ended() == 2
        assert len(process.stderr) == 1
        assert "OUTWAKE_DEV_IDENTITY" in process.stderr[0]


async def test_host_that_strangers_reach_by_explicit_wish(database: str) -> None:
    wish = {"OUTWAKE_HOST": "0.0.0.0", "OUTWAKE_DEV_IDENTITY": "1", "OUTWAKE_PUBLIC_URL": "http://api"}
    async with api(database, **wish) as process:
        ready = await process.event("api_ready")
        async with httpx.AsyncClient() as client:
            url = f"http://127.0.0.1:{ready['port']}/sessions"
            assert (await client.get(url, headers={"Host": "api"})).status_code == 200
            assert (await client.get(url, headers={"Host": "evil.test"})).status_code == 403


async def test_port_that_is_taken(database: str) -> None:
    async with api(database) as first:
        port = (await first.event("api_ready"))["port"]
        async with api(database, OUTWAKE_PORT=str(port)) as second:
            assert await second.ended() == 2
            assert f"port {port}" in second.stderr[-1]


async def test_start_without_postgres() -> None:
    async with api("postgresql://127.0.0.1:1/none") as process:
        ready = await process.event("api_ready")
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{ready['port']}") as client:
            assert (await client.get("/healthz")).status_code == 200
            response = await client.get("/sessions")
            assert response.status_code == 503
            assert json.loads(response.text)["type"] == "urn:outwake:problem:unavailable"
