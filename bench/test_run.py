"""Short runs of the real thing, so that the benchmarks do not rot; nothing is asked of their figures."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.contestant import ROOT
from outwake.embedded.postgres import EmbeddedPostgres

SHORT = "--rounds 1 --rows 200 --again 1 --samples 3 --finished 100 --idle 1"
ENQUEUE = """
from bench.server import Server
from bench.workloads import inserts
with Server.running() as server:
    print(*inserts(server, "enqueue", 2, 1), sep=";")
"""


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    EmbeddedPostgres(tmp_path / "server").remove()  # its data are elsewhere when root runs the tests


def python(state: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "BENCH_STATE": str(state), "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_parts_of_a_quick_run(state: Path) -> None:
    which = ("--only", "latency,drain1,claim,idle", "--contestants", "outwake c10,floor b10")
    done = python(state, "-m", "bench", "quick", *which, *SHORT.split())
    assert done.returncode == 0, done.stderr
    told = [line.split() for line in done.stdout.splitlines()]
    ratios = {line[1] for line in told if line[0] == "ratio"}
    assert ratios >= {"start_p50_vs_floor", "start_p99_vs_floor", "claim_10m_done_vs_empty"}
    (idle,) = (line for line in told if line[0] == "idle")
    assert idle[1::2] == ["queries", "cpu_s", "rss_mb"]
    parts = json.loads((state / "quick.json").read_text())["parts"]
    assert list(parts) == ["latency", "drain1", "claim", "idle"]
    assert [part["failed"] for part in parts.values()] == [[]] * 4
    drained = parts["drain1"]["figures"]
    assert (
        drained["drain1_per_s"].keys() == {"outwake c10", "floor b10"} == drained["drain1_warm_per_s"].keys()
    )


def test_sessions_posted_to_the_api_and_to_the_bare_route(state: Path) -> None:
    done = python(state, "-m", "bench", "quick", "--only", "http", "--rounds", "1", "--seconds", "1")
    assert done.returncode == 0, done.stderr
    (part,) = json.loads((state / "quick.json").read_text())["parts"].values()
    assert part["failed"] == []
    assert part["figures"]["post_sessions_per_s"].keys() == {"bare", "bearer"}


def test_inserts_with_and_without_triggers(state: Path) -> None:
    done = python(state, "-c", ENQUEUE)
    assert done.stdout.strip() == "no trigger;outwake, busy;always notifying", done.stderr


def test_what_does_not_exist_is_refused(tmp_path: Path) -> None:
    done = python(tmp_path, "-m", "bench", "quick", "--only", "latency,drain9")
    assert done.returncode == 2
    assert "unknown: drain9" in done.stderr


def test_no_page_is_written_without_a_result(tmp_path: Path) -> None:
    page = ROOT / "docs/benchmarks.md"
    before = page.read_bytes()
    done = python(tmp_path, "-m", "bench", "report")
    assert done.returncode == 1
    assert "has no result" in done.stderr
    assert page.read_bytes() == before
