"""`make fuzz-api`: schemathesis against /openapi.json of a real API, with authentication.

    python -m tests.fuzz_api [CASES]

CASES: how many are made up at most for each operation, besides those of its coverage phase. The run is the
same each time: fixed seed, no memory of earlier runs. Everything is checked: no 5xx, no answer that the
document does not tell, no refusal of what it allows, no acceptance of what it forbids, no access without a
token. The last line is `fuzz-api: cases N failures K`; the exit status is 1 if K is not 0.
"""

import asyncio
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx
import psycopg

from outwake._migrate import migrate
from outwake.session import token
from tests.support.database import new_database
from tests.support.issuer import bearer
from tests.support.manual_worker import ManualWorker
from tests.support.process import running
from tests.support.server import running_server, with_database

SEED = 5

# A name that has its form may be refused all the same: a branch with two dots, a parent that is not there.
CONFIGURATION = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 401, 404, 409, 422]
"""
# Sessions that are there. Only the stream of an archived one ends.
OPERATION = """
[[operations]]
include-operation-id = "{operation}"
parameters = {{ id = "{session}" }}
"""
OPEN = ("show_session", "rename_session", "create_prompt", "cancel_session", "list_messages")


async def fuzz(database: str, directory: Path, cases: int) -> tuple[int, int]:
    """Run against an API on this empty database. Returns the numbers of cases and of failures."""
    await migrate(database)
    environment = {
        "DATABASE_URL": database,
        "OUTWAKE_PORT": "0",
        "OUTWAKE_REQUIRE_TOKEN": "1",
        "OUTWAKE_STUCK_AFTER": "86400",  # nobody works here
        "OUTWAKE_WEBHOOK_SECRET": "whsec_" + "c2VjcmV0" * 4,
    }
    total = failed = 0
    async with (
        await psycopg.AsyncConnection.connect(database, autocommit=True) as conn,
        running("outwake", "api", env=environment) as api,
    ):
        await ManualWorker(conn).register()  # /readyz?workers=1 asks for one
        _, text = await token.create(conn, "fuzz", "fuzz", operator=True)
        ready = await api.event("api_ready")
        url = f"http://127.0.0.1:{ready['port']}"
        async with httpx.AsyncClient(base_url=url, headers=bearer(text)) as client:
            opened, archived = [await _session(client) for _ in range(2)]
            (await client.delete(f"/sessions/{archived}")).raise_for_status()
        told = [OPERATION.format(operation=name, session=opened) for name in OPEN]
        told.append(OPERATION.format(operation="follow_session", session=archived))
        (directory / "schemathesis.toml").write_text(CONFIGURATION + "".join(told))
        # Streams of other sessions do not end, so links are not followed to them.
        for operations, phases in (
            (["--exclude-operation-id", "follow_session"], "examples,coverage,fuzzing,stateful"),
            (["--include-operation-id", "follow_session"], "examples,coverage,fuzzing"),
        ):
            report = directory / f"{total}.json"
            command = [
                sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json",
                "--header", f"Authorization: Bearer {text}",
                "--phases", phases, "--max-examples", str(cases), "--seed", str(SEED),
                "--generation-deterministic",
                "--request-timeout", "60", "--no-color", "--continue-on-failure",
                "--report", "json", "--report-json-path", str(report),
                *operations,
            ]  # fmt: skip
            status = await asyncio.to_thread(_run, command, directory)
            done = json.loads(report.read_text())
            total += done["test_cases"]["generated"]
            failed += _failures(done, status)
        faults = [event for event in api.events if event.get("level") in ("error", "critical")]
        for event in faults:
            print(event)
    return total, failed + len(faults)


async def _session(client: httpx.AsyncClient) -> str:
    asked = {"repo": "octo/tools", "target_branch": "main", "prompt": "Do it"}
    answer = await client.post("/sessions", json=asked)
    return str(answer.raise_for_status().json()["id"])


def _run(command: list[str], directory: Path) -> int:
    return subprocess.run(command, cwd=directory, check=False).returncode


def _failures(report: dict[str, Any], status: int) -> int:
    counted = report["test_cases"]["unique_failures"] + len(report["errors"])
    return max(int(counted), int(status != 0))  # it failed, whatever it counted


def main() -> None:
    cases = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    with (
        tempfile.TemporaryDirectory() as directory,
        running_server(Path(directory) / "data") as server,
        new_database(server) as name,
    ):
        total, failed = asyncio.run(fuzz(with_database(server, name), Path(directory), cases))
    print(f"fuzz-api: cases {total} failures {failed}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
