"""A stand-in of the Claude Code CLI for tests that need no model: obeys the lines of its prompt.

    tool: COMMAND    runs a command by the sandbox's MCP tool; {repo} is the work tree
    say: TEXT        says it
    raw: TEXT        prints it as it is
    bigline: BYTES   prints one JSON line of that size
    environment      says its environment and its arguments
    fail             ends with a result that is an error

It takes the CLI's flags, keeps a transcript where the CLI does, and resumes only what it finds there.
"""

import argparse
import json
import os
import re
import sys
import urllib.request
from pathlib import Path
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser()
    for flag in ("--session-id", "--resume", "--mcp-config", "--append-system-prompt", "--permission-mode"):
        parser.add_argument(flag)
    for flag in ("--tools", "--allowedTools", "--disallowedTools", "--output-format"):
        parser.add_argument(flag)
    for flag in ("-p", "--verbose", "--strict-mcp-config"):
        parser.add_argument(flag, action="store_true")
    given = parser.parse_args()
    session = given.resume or given.session_id
    transcript = Path(os.environ["HOME"], ".claude", "projects", "-", f"{session}.jsonl")
    if given.resume and not transcript.exists():
        print(f"No conversation found with session ID: {session}", file=sys.stderr)
        return 1
    prompt = sys.stdin.read()
    transcript.parent.mkdir(parents=True, exist_ok=True)
    with transcript.open("a") as file:
        file.write(json.dumps({"prompt": prompt}) + "\n")
    url = next(iter(json.loads(Path(given.mcp_config).read_text())["mcpServers"].values()))["url"]
    found = re.search(r"work tree is at (\S+) there", given.append_system_prompt)
    assert found
    emit(type="system", subtype="init", session_id=session, cwd=os.getcwd())
    remembered = len(transcript.read_text().splitlines())
    say(session, f"I remember {remembered} prompts.")
    failed = False
    for line in prompt.splitlines():
        name, _, value = line.partition(": ")
        match name:
            case "tool":
                say(session, call_tool(url, value.replace("{repo}", found[1])))
            case "say":
                say(session, value)
            case "raw":
                print(value, flush=True)
            case "bigline":
                print('{"type": "assistant", "filler": "' + "x" * int(value) + '"}', flush=True)
            case "environment":
                say(session, json.dumps([dict(os.environ), sys.argv]))
            case "fail":
                print("stderr of the agent", file=sys.stderr)
                failed = True
    emit(
        type="result",
        subtype="success",
        is_error=failed,
        session_id=session,
        num_turns=1,
        total_cost_usd=0.25,
        usage={"input_tokens": 10, "output_tokens": 20},
        result="I was told to fail" if failed else "Done.",
    )
    return 1 if failed else 0


def emit(**event: Any) -> None:
    print(json.dumps(event), flush=True)


def say(session: str, text: str) -> None:
    emit(type="assistant", session_id=session, message={"content": [{"type": "text", "text": text}]})


def call_tool(url: str, command: str) -> str:
    params = {"name": "shell", "arguments": {"command": command}}
    asked = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
    request = urllib.request.Request(  # noqa: S310 - loopback
        url, json.dumps(asked).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:  # noqa: S310
        text: str = json.load(response)["result"]["content"][0]["text"]
    return text


if __name__ == "__main__":
    sys.exit(main())
