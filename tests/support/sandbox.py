"""A stand-in of the AIO sandbox: a real HTTP server that executes shell steps in a directory of its own.

Commands run as we do, with HOME and the working directory inside, and files are written only inside. Its
MCP endpoint (streamable HTTP, answers as plain JSON) offers one tool, `shell`.
"""

import asyncio
import base64
import os
import signal
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.support.faults import Dropped, Steps
from tests.support.loopback import Answer, Loopback, forgotten, route

TOOL = {
    "name": "shell",
    "description": "Run a shell command in the sandbox",
    "inputSchema": {
        "type": "object",
        "properties": {"command": {"type": "string"}},
        "required": ["command"],
    },
}


class Shell:
    """A command at work or done."""

    def __init__(self, command: str, process: asyncio.subprocess.Process) -> None:
        self.command = command
        self._process = process
        self._reading = asyncio.create_task(process.communicate())
        self.terminated = False

    async def wait(self, seconds: float | None) -> None:
        await asyncio.wait([self._reading], timeout=seconds)

    def kill(self) -> None:
        self.terminated = not self._reading.done()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def data(self, name: str) -> dict[str, Any]:
        done = self._reading.done()
        output = self._reading.result()[0].decode(errors="replace") if done else ""
        status = "terminated" if self.terminated else "completed" if done else "running"
        code = self._process.returncode if done else None
        shown: dict[str, Any] = {"status": status, "output": output, "console": [], "exit_code": code}
        return {"session_id": name, "command": self.command, **shown}


class Sandbox:
    """One sandbox."""

    def __init__(self, steps: Steps, home: Path) -> None:
        self.url = ""
        self.home = home
        self.commands: list[str] = []
        self.written: dict[str, bytes] = {}
        self.shells: dict[str, Shell] = {}
        self.environment: dict[str, str] = {}
        """What its commands find in their environment beside PATH and HOME."""
        self.mcp_broken = False
        self.patience: float | None = None
        """Seconds after which exec answers that nothing changes, though the command runs on."""
        self._steps = steps

    @property
    def item(self) -> dict[str, Any]:
        """What the allocator lends."""
        config = f'{{"mcpServers": {{"sandbox": {{"type": "http", "url": "{self.url}/mcp"}}}}}}'
        return {"api_url": self.url, "mcp_json_string": config}

    async def describe(self, request: Request) -> Answer:
        return 200, {"home_dir": str(self.home), "version": "stand-in", "detail": {}}

    async def write(self, request: Request) -> Answer:
        body = await request.json()
        path = Path(body["file"])
        if not path.is_relative_to(self.home):
            return 200, {"success": False, "message": "outside of the sandbox", "data": None}
        content = body["content"].encode()
        if body.get("encoding") == "base64":
            content = base64.b64decode(content)
        before = path.read_bytes() if body.get("append") else b""
        path.write_bytes(before + content)
        self.written[path.name] = content
        data = {"file": str(path), "bytes_written": len(content)}
        return 200, {"success": True, "message": "written", "data": data}

    async def execute(self, request: Request) -> Answer:
        body = await request.json()
        name = body.get("id") or str(uuid.uuid4())
        shell = self.shells[name] = await self.start(body["command"], body.get("exec_dir"))
        if not body.get("async_mode"):
            await shell.wait(self.patience or body.get("timeout"))
        data = shell.data(name)
        if data["status"] == "running" and not body.get("async_mode"):
            data["status"] = "no_change_timeout"
        return 200, {"success": True, "message": "executed", "data": data}

    async def start(self, command: str, directory: str | None = None) -> Shell:
        self.commands.append(command)
        process = await asyncio.create_subprocess_exec(
            *("bash", "--noprofile", "--norc", "-c", command),
            cwd=directory or self.home,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(self.home),
                "GIT_CONFIG_NOSYSTEM": "1",
                **self.environment,
            },
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        return Shell(command, process)

    async def wait(self, request: Request) -> Answer:
        body = await request.json()
        await self.shells[body["id"]].wait(body.get("seconds"))
        return await self.view(request)

    async def view(self, request: Request) -> Answer:
        name = (await request.json())["id"]
        data = self.shells[name].data(name)
        return 200, {"success": True, "message": "viewed", "data": data}

    async def kill(self, request: Request) -> Answer:
        name = (await request.json())["id"]
        if name not in self.shells:
            return 200, {"success": False, "message": "no such session", "data": None}
        self.shells[name].kill()
        return 200, {"success": True, "message": "killed", "data": None}

    async def mcp(self, request: Request) -> Response:
        asked = await request.json()
        if self.mcp_broken:
            return Response(status_code=500)
        if "id" not in asked:
            return Response(status_code=202)
        match asked["method"]:
            case "initialize":
                result: Any = {
                    "protocolVersion": asked["params"]["protocolVersion"],
                    "capabilities": {"tools": {}},
                    "serverInfo": {"name": "stand-in", "version": "1"},
                }
            case "tools/list":
                result = {"tools": [TOOL]}
            case "tools/call":
                try:
                    result = await self._call_tool(asked["params"])
                except Dropped:
                    return await forgotten(request)
            case _:
                error = {"code": -32601, "message": "method not found"}
                return JSONResponse({"jsonrpc": "2.0", "id": asked["id"], "error": error})
        return JSONResponse({"jsonrpc": "2.0", "id": asked["id"], "result": result})

    async def _call_tool(self, params: dict[str, Any]) -> dict[str, Any]:
        await self._steps.meet("tool")
        shell = await self.start(params["arguments"]["command"])
        await shell.wait(None)
        await self._steps.meet("tool done")
        data = shell.data("")
        return {"content": [{"type": "text", "text": data["output"]}], "isError": data["exit_code"] != 0}

    def close(self) -> None:
        for shell in self.shells.values():
            shell.kill()


@contextmanager
def sandbox(server: Loopback, steps: Steps, home: Path) -> Iterator[Sandbox]:
    """A sandbox whose home is `home`; what runs in it ends with the block."""
    home.mkdir(parents=True)
    made = Sandbox(steps, home.resolve())
    made.url = server.add(
        home.name,
        [
            route(steps, "describe", "/v1/sandbox", "GET", made.describe),
            route(steps, "write", "/v1/file/write", "POST", made.write),
            route(steps, "exec", "/v1/shell/exec", "POST", made.execute),
            route(steps, "wait", "/v1/shell/wait", "POST", made.wait),
            route(steps, "view", "/v1/shell/view", "POST", made.view),
            route(steps, "kill", "/v1/shell/kill", "POST", made.kill),
            Route("/mcp", made.mcp, methods=["POST"]),
        ],
    )
    try:
        yield made
    finally:
        made.close()
