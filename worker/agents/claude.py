"""The Claude Code CLI as the agent of a turn in a sandbox (docs/agent.md).

The CLI runs on the worker and reaches the sandbox by MCP. Its own tools are disabled, because they would work
on the worker's disk. Each attempt has a HOME of its own, into which the transcript of the session's earlier
turns is restored. The CLI files transcripts by working directory, so it runs in `/`, the same on every host.

The prompt and the MCP configuration are passed in files: a prompt may be longer than an argument can be, and
every user of the host can read arguments.
"""

import io
import json
import os
import re
import shlex
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from outwake.settings import Settings
from outwake.telemetry.log import get_logger
from outwake.worker.agents.stream import Event
from outwake.worker.errors import PermanentError

TRANSCRIPT_LIMIT = 32 * 2**20  # bytes, compressed
_TRANSCRIPTS = Path(".claude/projects")
_PASSED = re.compile(
    r"(?:ANTHROPIC|CLAUDE_CODE|MCP)_.*|(?:HTTPS?|NO)_PROXY|NODE_EXTRA_CA_CERTS|SSL_CERT_(?:FILE|DIR)",
    re.IGNORECASE,
)
_BUILT_IN = "Bash,Edit,Write,Read,Glob,Grep,NotebookEdit"
_PULL_REQUEST = re.compile(r"https?://[^\s<>\"'`()\[\]{}]+/(?:pull|merge_requests|pull-requests|pulls)/\d+")
_STDIN = 'exec "$@" < "$0"'

_ENVIRONMENT = {
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    # Without this the CLI may query the model before a slow MCP server has listed the sandbox's tools.
    "MCP_CONNECTION_NONBLOCKING": "0",
    "MCP_CONNECT_TIMEOUT_MS": "60000",
}

log = get_logger(__name__)


@dataclass(frozen=True)
class Command:
    """How an agent is started: `argv` in `cwd`; `env` is added to `worker/process/guarded.py`'s allow-list.

    servers: the MCP servers that the agent cannot work without.
    """

    argv: Sequence[str]
    cwd: Path
    env: Mapping[str, str]
    servers: Sequence[str] = ()


@dataclass(frozen=True)
class Transcript:
    """The state from which a conversation is resumed: its id, and a tar.gz relative to HOME."""

    session: str
    archive: bytes


def prepare(
    settings: Settings,
    place: Path,
    item: dict[str, Any],
    prompt: str,
    system: str,
    resumed: Transcript | None,
) -> Command:
    """Write the files that the CLI needs below `place` and return the command that starts it.

    item: the allocator's, with `mcp_json_string`. system: appended to the CLI's system prompt.
    Raises PermanentError if the item's MCP configuration is not valid.
    """
    home = place / "home"
    home.mkdir(mode=0o700)
    servers = mcp_servers(item)
    files = {"prompt": prompt, "mcp.json": item["mcp_json_string"]}
    for name, content in files.items():
        _write(place / name, content)
    if resumed is not None:
        with tarfile.open(fileobj=io.BytesIO(resumed.archive), mode="r:gz") as archive:
            archive.extractall(home, filter="data")
    argv = [
        *("/bin/sh", "-c", _STDIN, str(place / "prompt")),
        *shlex.split(settings.agent_command),
        *(("--resume", resumed.session) if resumed is not None else ("--session-id", str(uuid4()))),
        *("--mcp-config", str(place / "mcp.json"), "--strict-mcp-config"),
        *("--append-system-prompt", system),
        # All built-in tools are disabled. Those that touch the disk are also denied by name.
        *("--tools=", f"--disallowedTools={_BUILT_IN}"),
        f"--allowedTools={','.join(f'mcp__{name}' for name in servers)}",
        f"--permission-mode={settings.agent_permission_mode}",
    ]
    passed = {name: value for name, value in os.environ.items() if _PASSED.fullmatch(name)}
    return Command(argv, Path("/"), {**_ENVIRONMENT, **passed, "HOME": str(home)}, servers)


def mcp_servers(item: Any) -> list[str]:
    """The names of the MCP servers that an allocator's item configures, spelled as in names of tools."""
    try:
        servers = json.loads(item["mcp_json_string"])["mcpServers"]
        names = [_as_in_tools(name) for name in servers]
    except (KeyError, TypeError, ValueError):
        raise PermanentError("the allocator's item has no mcp_json_string that configures servers") from None
    if not names:
        raise PermanentError("the allocator's item configures no MCP server")
    return names


def unreached(event: Event, servers: Sequence[str]) -> list[str]:
    """Those of `servers` to which the CLI is not connected, as it reports in its first event.

    The CLI continues without them, and the model then has no tools.
    """
    told = event.get("mcp_servers")
    if event.get("subtype") != "init" or not isinstance(told, list):
        return []
    states = [(server.get("name"), server.get("status")) for server in told if isinstance(server, dict)]
    connected = [_as_in_tools(str(name)) for name, status in states if status == "connected"]
    return [name for name in servers if name not in connected]


def take_transcript(place: Path, session: str) -> Transcript | None:
    """The conversation so far; None if the agent left no transcript, or one that is too large to store."""
    home = place / "home"
    if not (home / _TRANSCRIPTS).is_dir():
        return None
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=6) as archive:
        archive.add(home / _TRANSCRIPTS, arcname=str(_TRANSCRIPTS))
    if buffer.tell() > TRANSCRIPT_LIMIT:
        log.warning("transcript_too_large", bytes=buffer.tell())
        return None
    return Transcript(session, buffer.getvalue())


def pull_request(event: Event) -> str | None:
    """The last URL of a pull or merge request in the agent's words in an event."""
    found = [match.group() for text in _said(event) for match in _PULL_REQUEST.finditer(text)]
    return found[-1] if found else None


def _as_in_tools(server: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", server)


def _said(event: Event) -> list[str]:
    if event.get("type") == "result":
        return [str(event.get("result") or "")]
    message = event.get("message")
    content = message.get("content") if isinstance(message, dict) else None
    parts = content if event.get("type") == "assistant" and isinstance(content, list) else []
    return [str(part.get("text") or "") for part in parts if isinstance(part, dict)]


def _write(path: Path, content: str) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(content)
