"""`make demo`: one session from HTTP to commit on an embedded Postgres, then everything is stopped."""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from outwake.embedded.stack import Stack, running

SEED_QUERY = "SELECT id, inbox_status, session_status FROM session ORDER BY created_at DESC LIMIT 5;"
_PROMPT = "Write down what you are asked to do here."
_TIMEOUT = 60.0  # seconds without an event


def main() -> None:
    """Run the demo. Exit status 0 if the session was completed and its prompt succeeded."""
    parser = argparse.ArgumentParser(prog="python -m outwake.embedded.demo", description=__doc__)
    parser.add_argument("--state", type=Path, default=Path(".state"), help="directory to work in")
    arguments = parser.parse_args()
    try:
        session = asyncio.run(_demo(arguments.state))
    except KeyboardInterrupt:
        sys.exit(130)
    # The last line, printed after everything has stopped.
    print(f"demo: session {session['id']} completed in {session['seconds']:.1f} s")


async def _demo(state: Path) -> dict[str, Any]:
    repository = make_repository(state / "repository")
    _say(f"a small Git repository is in {repository}")
    async with running(state, _say) as stack:
        began = time.monotonic()
        session = await _run_session(stack, repository)
        seconds = time.monotonic() - began
        _show_result(session)
        _show_table(stack)
        _say("stopping everything")
    _say("to keep it running and look around: make dev")
    return {**session, "seconds": seconds}


async def _run_session(stack: Stack, repository: Path) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=stack.api_url, timeout=_TIMEOUT, trust_env=False) as client:
        body = {"repo": repository.as_uri(), "target_branch": "main", "prompt": _PROMPT}
        _say(f"POST /sessions {json.dumps(body)}")
        answer = await client.post("/sessions", json=body)
        answer.raise_for_status()
        created = answer.json()
        present = "a worker is present" if created["worker_present"] else "no worker is present yet"
        _say(f"{answer.status_code}: session {created['id']}, {present}; its events:")
        path = f"/sessions/{created['id']}"
        async with client.stream("GET", f"{path}/events?until=completed") as stream:
            stream.raise_for_status()
            async for kind, data in _events(stream):
                print(f"    {kind:8} {_describe(kind, data)}", flush=True)
        session: dict[str, Any] = (await client.get(path)).json()
    if session["inbox_status"] != "completed" or session["prompts"][0]["status"] != "succeeded":
        sys.exit(f"demo: the session did not succeed: {json.dumps(session)}")
    return session


async def _events(stream: httpx.Response) -> Any:
    """Server-Sent Events as (event, data)."""
    kind, data = "message", ""
    async for line in stream.aiter_lines():
        if line.startswith("event:"):
            kind = line[6:].strip()
        elif line.startswith("data:"):
            data += line[5:].strip()
        elif not line and data:
            yield kind, json.loads(data)
            kind, data = "message", ""


def _describe(kind: str, data: dict[str, Any]) -> str:
    if kind == "status":
        return f"the session is {data['inbox_status']}"
    body = data.get("body", {})
    content = body.get("message", {}).get("content", [])
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    words = [str(part.get("text") or part.get("name") or part.get("type")) for part in parts]
    return f"{data.get('seq')} {body.get('type')} {' | '.join(words)[:100]}"


def _show_result(session: dict[str, Any]) -> None:
    result = session["prompts"][0]["result"]
    for commit in result["commits"]:
        _say(
            f"the scripted agent made commit {commit['sha'][:12]} on {session['branch']}: {commit['subject']}"
        )


def _show_table(stack: Stack) -> None:
    command = ["psql", stack.database_url, "-c", SEED_QUERY]
    _say("what Postgres says: " + subprocess.list2cmdline(command))
    environment = {**os.environ, "PGCONNECT_TIMEOUT": "10", "PAGER": ""}
    subprocess.run([str(stack.psql), *command[1:]], check=True, env=environment)


def make_repository(path: Path) -> Path:
    """A Git repository with one commit on main, created if it does not exist."""
    path = path.absolute()
    if not (path / ".git").exists():
        path.mkdir(parents=True, exist_ok=True)
        (path / "README.md").write_text("# A small repository for Outwake's demo\n")
        identity = ("-c", "user.name=Demo", "-c", "user.email=demo@outwake.invalid")
        for step in (
            ("init", "--quiet", "--initial-branch=main"),
            ("add", "README.md"),
            ("commit", "--quiet", "--message", "Begin"),
        ):
            subprocess.run(["git", *identity, "-C", str(path), *step], check=True)
    return path


def _say(text: str) -> None:
    print(f"demo: {text}", flush=True)


if __name__ == "__main__":
    main()
