"""The HTTP API of an AIO sandbox ("all in one", docs/sandbox.md): write a file, run a shell step.

HTTP status 200 alone proves nothing in this API. A step has succeeded only if the answer reports success, its
status is completed and its exit code is 0. Anything else is an error that names the step, never the command.
Secrets are passed in files, not in commands.
"""

import asyncio
import base64
import math
import re
import shlex
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any
from uuid import uuid4

import httpx

from outwake.telemetry import trace
from outwake.worker.agents.base import Command
from outwake.worker.ask import NoAnswer, ask
from outwake.worker.errors import PermanentError, TransientError
from outwake.worker.sandboxes.base import STEP_TIMEOUT, StepError, StepTimeout

_ANSWER = 60.0  # seconds for an answer, beyond what a step may take
_WAIT = 30  # seconds of one /v1/shell/wait
_PAUSE = 0.05
_PIECE = 512 * 1024  # bytes of a file in one request
_NAME = 200  # characters of a word of the sandbox's
_KILL_TIMEOUT = 10.0
_PRINTED = 1 << 20  # characters of a step's output that are read: some milliseconds of work
_TERMINAL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")
_SLACK = 10.0  # seconds that the sandbox has to report its own timeout


class AioSandbox:
    """A client of one sandbox; made by `connect`."""

    def __init__(self, client: httpx.AsyncClient, mcp_config: str) -> None:
        self._client = client
        self._mcp_config = mcp_config

    @classmethod
    @asynccontextmanager
    async def connect(cls, item: Any) -> AsyncIterator["AioSandbox"]:
        """Connect to the sandbox of an allocator's item. Raises PermanentError if the item names none."""
        url = item.get("api_url") if isinstance(item, dict) else None
        if not isinstance(url, str) or not url.startswith(("http://", "https://")):
            raise PermanentError("the allocator's item has no api_url")
        # Without the environment's proxy, which serves external hosts: sandboxes are internal.
        async with httpx.AsyncClient(base_url=url, headers=trace.headers(), trust_env=False) as client:
            config = item.get("mcp_json_string")
            yield cls(client, config if isinstance(config, str) else "")

    def agent_command(self, command: Command) -> Command:
        """As given: the agent runs on this worker, and reaches the sandbox by MCP."""
        return command

    def mcp_config(self) -> str:
        """The item's MCP configuration, unchecked; empty if it has none."""
        return self._mcp_config

    async def write(self, path: str, content: bytes) -> None:
        """Write a file, in pieces that are made into JSON in some milliseconds each.

        Raises TransientError or PermanentError if the sandbox does not confirm it.
        """
        for start in range(0, len(content) or 1, _PIECE):
            piece = content[start : start + _PIECE]
            encoded = base64.b64encode(piece).decode()
            body = {"file": path, "content": encoded, "encoding": "base64", "append": start > 0}
            data = await self._call("file/write", body)
            if data.get("bytes_written") not in (None, len(piece)):
                raise TransientError("the sandbox wrote only a part of a file")

    async def run(self, step: str, script: str, *arguments: str, timeout: float = STEP_TIMEOUT) -> str:
        """Run a shell script with arguments `$1`, `$2` …; return its output without the last line break.

        step: its name in errors. The arguments are quoted; the script must be our own text.

        Raises StepError for an exit code other than 0, StepTimeout if the script did not end within `timeout`
        seconds, TransientError if the sandbox can't be reached, PermanentError if it refuses.
        """
        # We choose the id, so that a step can be killed even if its answer never came.
        shell = f"outwake-{uuid4()}"
        command = shlex.join(["sh", "-euc", script, "sh", *arguments])
        try:
            async with asyncio.timeout(timeout + _SLACK):
                data = await self._exec(step, shell, command, timeout)
        except TimeoutError:
            await self._kill(shell)
            raise StepTimeout(f"{step}: not done within {timeout:g} seconds") from None
        except BaseException:
            await self._kill(shell)
            raise
        code, output = data.get("exit_code"), _text(data.get("output"))
        if not isinstance(code, int):
            raise TransientError(f"{step}: the sandbox gave no exit code")
        if code != 0:
            raise StepError(step, code, output)
        return output.rstrip("\n")

    async def _exec(self, step: str, shell: str, command: str, timeout: float) -> dict[str, Any]:
        until = time.monotonic() + timeout
        data = await self._call(
            "shell/exec", {"id": shell, "command": command, "async_mode": False, "timeout": timeout}, timeout
        )
        named = data.get("session_id")
        shell = named if isinstance(named, str) and 0 < len(named) <= _NAME else shell
        # A step without output may still run: a clone prints nothing.
        while data.get("status") in ("running", "no_change_timeout"):
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError
            seconds = min(_WAIT, math.ceil(left))
            await self._call("shell/wait", {"id": shell, "seconds": seconds}, seconds)
            await asyncio.sleep(_PAUSE)  # in case the call returns at once
            data = await self._call("shell/view", {"id": shell})
        if data.get("status") != "completed":
            raise TransientError(f"{step}: the sandbox's shell ended as {_short(data.get('status'))}")
        return data

    async def _kill(self, shell: str) -> None:
        """Kill what a step left running, if the sandbox still answers. The step has failed anyway."""
        with suppress(TransientError, PermanentError, TimeoutError):
            async with asyncio.timeout(_KILL_TIMEOUT):
                await self._call("shell/kill", {"id": shell})

    async def _call(self, route: str, body: dict[str, Any], timeout: float = 0) -> dict[str, Any]:
        try:
            status, _, answer = await ask(
                self._client, "POST", f"/v1/{route}", body=body, seconds=_ANSWER + timeout
            )
        except NoAnswer as error:
            raise TransientError(f"the sandbox can't be reached: {error}") from error
        if 400 <= status < 500:
            raise PermanentError(f"the sandbox refused {route} with status {status}")
        if not isinstance(answer, dict) or not 200 <= status < 300:
            raise TransientError(f"the sandbox answered {route} with status {status}")
        if answer.get("success") is not True:
            raise TransientError(f"the sandbox failed at {route}: {_short(answer.get('message'))}")
        data = answer.get("data")
        return data if isinstance(data, dict) else {}


def _short(said: Any) -> str:
    return said[:_NAME] if isinstance(said, str) else "nothing that can be told"


def _text(output: Any) -> str:
    """The end of what was printed, without a terminal's codes and characters that Postgres refuses."""
    last = output[-_PRINTED:] if isinstance(output, str) else ""
    text = _TERMINAL.sub("", last).replace("\0", "\ufffd")
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
