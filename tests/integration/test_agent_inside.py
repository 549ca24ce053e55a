"""An agent that runs in its sandbox, away from the worker: its command, environment, files and memory.

What the agent and the steps see as /mnt is a directory of this host, which only the sandbox mounts there
(unshare). So a path of the sandbox means nothing to the worker.
"""

import json
import shlex
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from outwake.settings import Settings
from outwake.worker.agents import kinds
from outwake.worker.agents.base import AgentTurn, Box, Command
from outwake.worker.handlers.session import run_turn
from outwake.worker.sandboxes import choice
from outwake.worker.sandboxes.base import STEP_TIMEOUT, Item
from outwake.worker.sandboxes.directory import DirectoryProvider, DirectorySandbox
from tests.conftest import Connect
from tests.support.api import Api
from tests.support.production import Production, api, parts, rows
from tests.support.worker import watched

__all__ = ["api", "parts"]  # fixtures

INSIDE = "/mnt"
_ENTER = f'mount --bind "$0" {INSIDE}; cd "$1"; shift; exec "$@"'

pytestmark = pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0,
    reason="no user namespaces here",
)

AGENT = """
import json, os, sys
from pathlib import Path
home = Path(os.environ["HOME"], ".notes")
home.mkdir(exist_ok=True)
before = [path.read_text() for path in sorted(home.iterdir())]
prompt = Path(sys.argv[1]).read_text()
(home / str(len(before))).write_text(prompt)
if not before:
    (home / "link").symlink_to("0")
Path("WRITTEN").write_text(prompt)
said = {"cwd": os.getcwd(), "environment": dict(os.environ), "files": sys.argv[1], "before": before}
print(json.dumps({"type": "system", "subtype": "init", "session_id": "s"}))
print(json.dumps({"type": "assistant", "text": json.dumps(said)}))
print(json.dumps({"type": "result", "result": "Done.", "session_id": "s"}))
print("words on stderr", file=sys.stderr)
"""


class Noting:
    """An agent with files and a memory, which runs in a sandbox."""

    name = "noting"
    by_mcp = False
    promises_result = True
    remembers: str | None = ".notes"

    def __init__(self, settings: Settings) -> None:
        pass

    def command(self, turn: AgentTurn, box: Box) -> Command:
        return Command(
            [sys.executable, "-c", AGENT, f"{box.place}/prompt"],
            box.tree,
            env={"GIVEN": "to the agent"},
            files={"prompt": turn.prompt},
            home=turn.memory.content if turn.memory else b"",
        )


class Apart(DirectorySandbox):
    """A directory that its steps and its agent see as INSIDE, and cannot see otherwise."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self._host = place

    async def run(self, step: str, script: str, *arguments: str, timeout: float = STEP_TIMEOUT) -> str:
        entered = self._entered(["sh", "-euc", script, "sh", *arguments], INSIDE)
        script = f"export HOME={INSIDE} OUTWAKE_HOME={INSIDE}; exec {shlex.join(entered)}"
        return await super().run(step, script, timeout=timeout)

    async def write(self, path: str, content: bytes) -> None:
        assert path.startswith(INSIDE)
        await super().write(str(self._host) + path.removeprefix(INSIDE), content)

    def agent_command(self, command: Command) -> Command:
        given = [f"{name}={value}" for name, value in command.env.items()]
        argv = ["env", "-i", "PATH=/usr/bin:/bin", *given, *command.argv]
        return replace(command, argv=self._entered(argv, command.cwd), cwd="/", env={})

    def _entered(self, argv: list[str], cwd: str) -> list[str]:
        return ["unshare", "-rm", "sh", "-euc", _ENTER, str(self._host), cwd, *argv]


class ApartProvider(DirectoryProvider):
    @asynccontextmanager
    async def connect(self, held: Item) -> AsyncIterator[DirectorySandbox]:
        async with super().connect(held):
            yield Apart(Path(held["item"]["workspace"]))


async def completed(api: Api, session: str) -> None:
    async with api.follow(session, "?until=completed") as events:
        await events.rest()


async def said(api: Api, session: str) -> list[dict[str, Any]]:
    answer = await api.client.get(f"/sessions/{session}/messages?limit=100")
    bodies = [message["body"] for message in answer.json()["messages"]]
    return [json.loads(body["text"]) for body in bodies if body["type"] == "assistant"]


async def test_an_agent_works_in_a_sandbox_that_the_worker_cannot_see(
    parts: Production,
    database: str,
    api: Api,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two turns, each in a sandbox of its own: the second goes on from the first one's work and memory."""
    root = parts.directory / "host"
    monkeypatch.setitem(choice.PROVIDERS, "directory", lambda _: ApartProvider(root))
    monkeypatch.setitem(kinds.ADAPTERS, "command", Noting)
    more: dict[str, Any] = {"IP_ALLOCATOR_URL": None, "OUTWAKE_AGENT_COMMAND": "sh", "OUTWAKE_LEASE": "600"}
    for name, value in parts.environment(database, **more).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    conn = await connect()
    created = await api.create(repo=parts.repo, prompt="the first")
    async with watched(database, "session.run", run=run_turn):
        await completed(api, created["id"])
        answer = await api.client.post(f"/sessions/{created['id']}/prompts", json={"prompt": "the second"})
        assert answer.status_code == 201
        await completed(api, created["id"])

    first, second = await said(api, created["id"])
    assert first["cwd"] == f"{INSIDE}/repo"
    assert first["files"] == f"{INSIDE}/agent/prompt"
    first["environment"].pop("LC_CTYPE", None)  # Python's own
    assert first["environment"] == {
        "PATH": "/usr/bin:/bin",
        "GIVEN": "to the agent",
        "HOME": f"{INSIDE}/agent/home",
    }
    assert (first["before"], second["before"]) == ([], ["the first"])  # without the link
    prompts = (await api.client.get(f"/sessions/{created['id']}")).json()["prompts"]
    assert [prompt["status"] for prompt in prompts] == ["succeeded", "succeeded"]
    assert [len(prompt["result"]["commits"]) for prompt in prompts] == [1, 1]
    ((agent, transcript),) = await rows(conn, "SELECT agent, transcript FROM session_memory")
    assert agent == "noting"
    with tarfile.open(fileobj=BytesIO(transcript)) as kept:
        assert {member.name for member in kept if member.isfile()} == {".notes/0", ".notes/1"}
