"""`make dev`: the demo's parts, kept running until Ctrl-C."""

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

from outwake.embedded.demo import SEED_QUERY, make_repository
from outwake.embedded.stack import running

API_PORT = 8000
POSTGRES_PORT = 5439
_STATE = Path(".state")


def main() -> None:
    """Run until SIGINT or SIGTERM."""
    try:
        asyncio.run(_dev())
    except RuntimeError as error:
        sys.exit(f"dev: {error}")


async def _dev() -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    repository = make_repository(_STATE / "repository")
    async with running(_STATE, _say, api_port=API_PORT, postgres_port=POSTGRES_PORT) as stack:
        body = f'{{"repo": "{repository.as_uri()}", "target_branch": "main", "prompt": "Say hello"}}'
        _say(f"dashboard: {stack.api_url}/")
        _say(f"API documentation: {stack.api_url}/docs")
        _say(f"curl {stack.api_url}/sessions -H 'Content-Type: application/json' -d '{body}'")
        _say(subprocess.list2cmdline([str(stack.psql), stack.database_url, "-c", SEED_QUERY]))
        _say(f"logs: {_STATE}/api.log and {_STATE}/worker.log; Ctrl-C stops everything")
        await stop.wait()
        _say("stopping")


def _say(text: str) -> None:
    print(f"dev: {text}", flush=True)


if __name__ == "__main__":
    main()
