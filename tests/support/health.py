"""What a worker's health server says, and `worker --check`."""

import json
from http.client import HTTPConnection

from tests.support.process import running


def ask(port: int, path: str, method: str = "GET") -> tuple[int, dict[str, object]]:
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path)
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response.status, json.loads(text) if text else {}


async def check(port: int | str | None) -> tuple[int, list[str]]:
    env = {"DATABASE_URL": "postgresql:///x", "OUTWAKE_HEALTH_PORT": None if port is None else str(port)}
    async with running("worker", "--check", env=env) as process:
        return await process.ended(), process.stderr
