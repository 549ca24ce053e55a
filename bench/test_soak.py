"""A soak of seconds: what it counts, and when its producer skips rows."""

import json
from pathlib import Path

import pytest

from bench.soak_report import report
from bench.test_run import python, state

SOAK = """
import json, time
from bench.server import Server
from bench.soak import ALL, BACKLOG, _is_behind, _soaking
from outwake.schema import in_schema
with Server.running() as server, _soaking(server, ALL, 300) as soak:
    soak.settled(60)
    counted = len(soak._latencies)
    soak.minute()
    conn = server.connect("bench")
    first = conn.execute(in_schema("SELECT max(id) FROM :schema.outbox")).fetchone()[0] + 1
    stuck = in_schema("INSERT INTO :schema.outbox (id, topic, available_at) VALUES (%s, %s, 'tomorrow')")
    behind = []
    for topic in ("outbox.other", "bench.noop"):
        conn.execute(stuck, (first - 1 + 2 * BACKLOG, topic))
        behind.append(_is_behind(conn, first - 1 + 3 * BACKLOG))
        conn.execute(in_schema("DELETE FROM :schema.outbox WHERE id >= %s"), (first,))
    soak.load(500)
    soak.watch(time.monotonic() + 2)
    soak.make_prune_due()
    soak.load(0)
    soak.settled(60)
    timed = len(soak._latencies)
    record = soak.minute()
    print(json.dumps([counted, behind, timed, record, soak.produced, soak.done, soak.odd]))
"""

__all__ = ["state"]


def test_a_soak_counts_and_times_each_row_once(state: Path) -> None:
    ran = python(state, "-c", SOAK)
    assert ran.returncode == 0, ran.stderr
    counted, behind, timed, record, produced, done, odd = json.loads(ran.stdout.splitlines()[-1])
    assert counted == 2000  # every tenth of the 20,000 that were there
    assert behind == [False, True]
    assert produced > 20_000
    assert (done, odd) == (produced, 0)
    assert timed == pytest.approx((produced - 20_000) / 10, abs=1)
    assert 0 < record["p50_ms"] <= record["p99_ms"] <= record["max_ms"]
    assert record["backlog"] == record["skipped"] == 0
    assert record["used"] > 0


def test_the_report_leaves_out_what_came_before_rows_were_pruned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bench.soak_report.DOCS", tmp_path)
    minute = {"p50_ms": 5.0, "p99_ms": 20.0, "table_mb": 9.0, "index_mb": 1.0, "worker_mb": 1.0, "used": 0.5}
    minutes = [
        {**minute, "at_s": 60.0 * n, "table_mb": float(n), "others": n / 10, "skipped": 0, "held": False}
        for n in range(1, 9)
    ]
    minutes[6]["p99_ms"] = 50.0
    result = {"at": "now", "server": "18", "cores": 1, "share": 0.6, "held": 0, "retention_s": 61}
    rates = {"rate_per_s": 6, "peak_per_s": 20, "sustained_per_s": 10}
    report({**result, **rates, "minutes_seen": minutes, "bursts": []})
    said = capsys.readouterr().out
    assert " table_first_mb 5.5 table_last_mb 5.5 " in said  # minutes 3 to 8
    assert " p99_ms 20.0 p99_worst_minute_ms 50.0 minutes_above_twice_p99 1 " in said
    assert " others_worst_minute 0.8 " in said
