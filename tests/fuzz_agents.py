"""`make fuzz-agents`: agents with made-up output, work trees and endings, run by a real worker.

    python -m tests.fuzz_agents [CASES] [SEED]

hypothesis makes up the cases from the seed, which is printed; the same seed makes the same cases. Each case
is a session. A case fails if
- its agent ran not exactly once, or its row did not end at the first attempt,
- a file that the agent wrote is neither in the session's stored commits nor named by the verdict.
The run fails also if the worker's event loop stood still for more than STALL milliseconds of CPU. The exit
status is 1 if it failed. The last line is `fuzz-agents: cases N failures M stall_ms X`.
"""

import asyncio
import json
import os
import secrets
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psycopg
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from outwake._migrate import migrate
from outwake.embedded.demo import make_repository
from tests.support.database import new_database
from tests.support.process import ROOT, Process, running
from tests.support.server import running_server, with_database

STALL = 250.0
"""Milliseconds of CPU, as tests/support/observed_loop.py counts them. The goal is 100; a fault that was
planted took 1,900. A slow machine must not fail the run."""
LONGEST_CASE = 90.0  # seconds without any end of a turn after which a run is given up
AGENT = ROOT / "tests" / "support" / "fuzz_agent.py"

Steps = list[list[Any]]

# What is worst for some place that reads an agent's output: tests/unit/test_growth.py.
_PATTERNS = ("[", '{"a":[', "[],", "1", '"\\u0000",', "http://", "https://a/pull/1 ", "token-", "secret='",
             "\xff", "\0", "a.", "password: x ", "bearer ", "\\ud800", "> ", "![", "\n")  # fmt: skip
_NAMES = ("a", "src/main.py", "space in name", "dir/with space/f", "-dash", "quote'\"", "line\nbreak",
          "caf\xe9", "app/f", "app/deep/er/f", ".hidden", "x" * 200, "[glob]*", "\\back",
          "tab\there")  # fmt: skip


def _line(value: Any) -> str:
    return json.dumps(value) + "\n"


def _result(**fields: Any) -> Steps:
    return [["out", _line({"type": "result", "subtype": "success", "result": "Done.", **fields}), 1]]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
_TYPES = st.sampled_from(["assistant", "user", "system", "result", "text", "superseded", "truncated", "x"])
_EVENT = st.fixed_dictionaries(
    {"type": _TYPES},
    optional={
        "message": st.fixed_dictionaries({"content": st.lists(_JSON, max_size=3)}) | _JSON,
        "text": _JSON,
        "session_id": _JSON,
        "usage": _JSON,
        "total_cost_usd": _JSON | st.just(10**400),
        "permission_denials": _JSON,
        "errors": _JSON,
    },
)
_TIMES = st.sampled_from([1, 100, 10_000, 100_000, 1_000_000])


def _much(pattern: str, size: int) -> list[Any]:
    return [pattern, max(1, size // len(pattern))]


_STEP: st.SearchStrategy[list[Any]] = st.one_of(
    st.tuples(st.sampled_from(_PATTERNS), _TIMES).map(lambda of: ["out", *_much(*of)]),
    st.tuples(st.sampled_from(_PATTERNS), _TIMES).map(lambda of: ["err", *_much(*of)]),
    st.tuples(st.sampled_from(_PATTERNS), _TIMES).map(lambda of: ["say", *_much(*of)]),
    _EVENT.map(lambda event: ["out", _line(event), 1]),
    st.tuples(_EVENT, st.sampled_from([10, 3000])).map(lambda of: ["out", _line(of[0]), of[1]]),
    st.binary(max_size=200).map(lambda data: ["out", data.decode("latin-1"), 1]),
    st.tuples(st.sampled_from(_NAMES), st.sampled_from([0, 1, 10_000])).map(lambda of: ["file", *of]),
    st.sampled_from(
        [
            ["git", "add", "--all"],
            ["git", "commit", "--quiet", "--allow-empty", "-m", "Mine"],
            ["git", "checkout", "--quiet", "--detach"],
            ["git", "checkout", "--quiet", "-b", "other"],
            ["git", "init", "--quiet", "app"],
            ["git", "config", "core.worktree", "/nowhere"],
            ["git", "config", "core.fsmonitor", "false; sleep 100"],
            ["git", "config", "filter.x.clean", "sleep 100"],
            ["git", "pack-refs", "--all"],
            ["child"],
            ["daemon"],
            ["ignore"],
        ]
    ),
)
_ENDINGS: list[Steps] = [
    [*_result(), ["exit", 0]],
    [*_result(), ["exit", 0]],
    [*_result(is_error=True), ["exit", 1]],
    [*_result(total_cost_usd=10**400, num_turns=-1, usage={"input_tokens": "x"}), ["exit", 0]],
    [*_result(permission_denials=[{"tool_name": "Write"}]), ["exit", 0]],
    [*_result(), ["stay"]],
    [*_result(), ["child"], ["exit", 0]],
    [*_result(), *_result(result=["x"]), ["exit", 0]],
    [["exit", 0]],
    [["exit", 3]],
    [["kill", 9]],
    [["kill", 6]],
    [["close"], ["exit", 0]],
    [["daemon"], ["guardian", 9], ["stay"]],
    [*_result(), ["guardian", 19], ["stay"]],
]
# Every case has all patterns, so that a few cases meet each place that is slow for one of them.
_FLOOD = st.sampled_from([1_000, 60_000]).map(
    lambda size: [
        ["flood", "say", list(_PATTERNS), size],
        ["flood", "out", list(_PATTERNS), size],
        ["flood", "err", list(_PATTERNS), size // 20],  # of stderr only the last 64 KiB are kept
        ["items", '["\\ud800"]', size * 3 // 4],
    ]
)
_CASE = st.tuples(_FLOOD, st.lists(_STEP, max_size=6), st.sampled_from(_ENDINGS)).map(
    lambda of: [*of[0], *of[1], *of[2]]
)


def made_up(cases: int, number: int) -> list[Steps]:
    """The steps of each case."""
    found: list[Steps] = []

    @seed(number)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(_CASE)
    def collect(steps: Steps) -> None:
        found.append(steps)

    collect()
    return found


_ENQUEUE = """
WITH s AS (
    INSERT INTO session (repo, target_branch, branch, title, user_id)
    VALUES (%(repo)s, 'main', %(branch)s, 'A case', 'fuzz') RETURNING id
), p AS (
    INSERT INTO prompt (session_id, text) SELECT id, %(text)s FROM s RETURNING id, session_id
)
INSERT INTO outbox (topic, ordering_key, payload)
SELECT 'session.run', 'session:' || session_id, jsonb_build_object('session_id', session_id, 'prompt_id', id)
FROM p
RETURNING id
"""
_ENDED = "SELECT count(*) FROM outbox WHERE topic = 'session.run' AND state IN ('done', 'dead', 'cancelled')"
_OUTCOME = """
SELECT o.state, o.attempt, p.status, p.reason, p.result, m.bundle
FROM outbox AS o
JOIN prompt AS p ON p.id::text = o.payload ->> 'prompt_id'
LEFT JOIN session_memory AS m ON m.session_id = p.session_id
WHERE o.id = %s
"""


class Fuzz:
    """A run: a database, a repository, a worker, and what is checked afterwards."""

    def __init__(self, database: str, directory: Path, cases: list[Steps]) -> None:
        self._database = database
        self._directory = directory
        self._cases = cases
        self._record = directory / "record"
        self._record.mkdir()
        self._repository = make_repository(directory / "repository")
        self._check = directory / "check.git"
        self._git("clone", "--quiet", "--bare", str(self._repository), str(self._check), inside=False)
        self.stall = 0.0

    async def run(self) -> list[str]:
        """The failures, a line each."""
        env = {
            "DATABASE_URL": self._database,
            "OUTWAKE_ALLOW_FILE_REPOS": "true",
            "OUTWAKE_SANDBOX": "directory",
            "OUTWAKE_WORKSPACE_ROOT": str(self._directory / "workspaces"),
            "OUTWAKE_AGENT_COMMAND": shlex.join([sys.executable, "-I", "-S", str(AGENT)]),
            "OUTWAKE_AGENT_TIMEOUT": "20",
            "OUTWAKE_DRAIN_GRACE": "0",
        }
        async with await psycopg.AsyncConnection.connect(self._database, autocommit=True) as conn:
            rows = [await self._enqueue(conn, number) for number in range(len(self._cases))]
            arguments = ("-m", "tests.support.observed_loop", "worker", "--concurrency", "4")
            async with running(sys.executable, *arguments, env=env) as worker:
                freeze = await self._ended(conn, worker)
            self.stall = max((event["ms"] for event in _events(worker, "stalled")), default=0.0)
            failures = [freeze] if freeze else []
            for number, row in enumerate(rows):
                outcome = await (await conn.execute(_OUTCOME, (row,))).fetchone()
                assert outcome is not None
                failures += [f"case {number}: {fault}" for fault in self._faults(number, *outcome)]
        return failures

    async def _enqueue(self, conn: psycopg.AsyncConnection[Any], number: int) -> int:
        text = json.dumps({"case": number, "record": str(self._record), "steps": self._cases[number]})
        values = {"repo": self._repository.as_uri(), "branch": f"work-{number}", "text": text}
        row = await (await conn.execute(_ENQUEUE, values)).fetchone()
        assert row is not None
        return int(row[0])

    async def _ended(self, conn: psycopg.AsyncConnection[Any], worker: Process) -> str:
        """Wait until every row has ended. Returns what was seen if none ends any more."""
        ended, quiet = 0, 0.0
        while ended < len(self._cases):
            await asyncio.sleep(0.2)  # nothing tells us: the worker may be frozen
            row = await (await conn.execute(_ENDED)).fetchone()
            assert row is not None
            quiet = quiet + 0.2 if row[0] == ended else 0.0
            ended = row[0]
            if quiet > LONGEST_CASE or not worker.running:
                return f"{ended} of {len(self._cases)} rows ended, then none for {quiet:.0f} s"
        return ""

    def _faults(
        self, number: int, state: str, attempt: int, status: str, reason: str, result: Any, bundle: bytes
    ) -> list[str]:
        faults = []
        if (state, attempt) != ("done", 1):
            faults.append(f"its row is {state} at attempt {attempt}: {reason}")
        if (runs := len(self._noted(number, "runs"))) != 1:
            faults.append(f"its agent ran {runs} times")
        kept = self._kept(number, result, bundle)
        lost = {path for path in self._noted(number, "files") if path not in kept}
        faults += [
            f"{path!r} is lost, and the verdict is {status}: {reason}"
            for path in lost
            if not _named(path, reason)
        ]
        return faults

    def _noted(self, number: int, kind: str) -> list[str]:
        path = self._record / f"{number}.{kind}"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def _kept(self, number: int, result: Any, bundle: bytes | None) -> set[str]:
        """The paths of the stored commits."""
        if bundle:
            path = self._directory / f"{number}.bundle"
            path.write_bytes(bundle)
            self._git("bundle", "unbundle", str(path))
        head = result.get("head") if isinstance(result, dict) else None
        return set(self._git("ls-tree", "-r", "-z", "--name-only", head).split("\0")) if head else set()

    def _git(self, *arguments: str, inside: bool = True) -> str:
        where = ("--git-dir", str(self._check)) if inside else ()
        done = subprocess.run(["git", *where, *arguments], stdout=subprocess.PIPE, check=True)
        return os.fsdecode(done.stdout)


def _named(path: str, reason: str | None) -> bool:
    """Whether the reason has the path, or a directory above it."""
    parts = path.replace("\n", " ").split("/")
    return reason is not None and any("/".join(parts[: n + 1]) in reason for n in range(len(parts)))


def _events(worker: Process, name: str) -> list[dict[str, Any]]:
    found = []
    for line in worker.stderr:
        if line.startswith("{"):
            event = json.loads(line)
            if event.get("event") == name:
                found.append(event)
    return found


def main(argv: list[str]) -> int:
    cases = int(argv[0]) if argv else 100
    number = int(argv[1]) if len(argv) > 1 else secrets.randbelow(10**9)
    print(f"fuzz-agents: seed {number}", flush=True)
    scripts = made_up(cases, number)
    with (
        tempfile.TemporaryDirectory() as directory,
        running_server(Path(directory, "postgres")) as server,
        new_database(server) as name,
    ):
        database = with_database(server, name)
        asyncio.run(migrate(database))
        fuzz = Fuzz(database, Path(directory), scripts)
        failures = asyncio.run(fuzz.run())
    for failure in failures:
        print(failure)
        if failure.startswith("case "):
            steps = scripts[int(failure.split()[1].rstrip(":"))]
            print(f"    {json.dumps(steps)[:2000]}")
    print(f"fuzz-agents: cases {len(scripts)} failures {len(failures)} stall_ms {fuzz.stall:.0f}")
    return 1 if failures or fuzz.stall > STALL else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
