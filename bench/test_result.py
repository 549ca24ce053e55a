"""Merging of parts, medians, ratios, the page and its plots, from made-up results."""

import subprocess
from pathlib import Path

import pytest

from bench.plots import plot
from bench.report import lines, write
from bench.result import GOALS, Figures, Part, Parts, Seen, load, measured, ratios, save, tables
from bench.server import state_directory


def part(figures: Figures, *, at: str = "2026-01-01 00:00", **once: dict[str, float]) -> Part:
    return {
        "at": at,
        "commit": "abc1234",
        "arguments": {"extent": "all", "rounds": 2, "samples": 4, "rows": 100, "again": 1, "idle": 600.0},
        "machine": {"cores": 2, "system": "Linux", "python": "3.11"},
        "server": {"version": "18", "shared_buffers": "512MB", "max_wal_size": "4GB"},
        "figures": figures,
        "once": once,
        "failed": [],
    }


LATENCY = part(
    {
        "start_ms": {
            "outwake c10": [[1.0, 1.0, 1.0, 9.0], [1.0, 1.0, 1.0, 2.0]],
            "floor b10": [[0.5, 0.5, 0.5, 3.0], [0.5, 0.5, 0.5, 3.0]],
            "graphile best": [[2.0], [2.0]],
            "pgqueuer best": [[4.0], [4.0]],
        }
    }
)
DRAIN = part(
    {
        "drain1_per_s": {
            "outwake c10": [10.0, 20.0],
            "outwake c500": [300.0, 100.0, 200.0],
            "floor b100": [200.0],
            "floor b10": [9999.0],
            "graphile best": [100.0],
        }
    },
    at="2026-01-02 00:00",
)


def test_parts_run_at_different_times_are_merged(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "result.json"
    assert load(path) == {}
    save(path, {"latency": LATENCY, "drain1": part({})})
    save(path, {"drain1": DRAIN})
    found = load(path)
    assert found == {"latency": LATENCY, "drain1": DRAIN}
    assert {name: one["at"][:10] for name, one in found.items()} == {
        "latency": "2026-01-01",
        "drain1": "2026-01-02",
    }
    assert ratios(found).keys() >= {"start_p50_vs_floor", "drain1_vs_floor"}


def test_the_p99_is_of_all_rounds_samples() -> None:
    table = tables({"latency": LATENCY})
    # The median of the rounds' own p99 would be (9 + 2) / 2.
    assert table["start_p99_ms"]["outwake c10"] == Seen(9.0, 2.0, 9.0)
    assert table["start_p50_ms"]["outwake c10"] == Seen(1.0, 1.0, 1.0)
    assert "start_ms" not in table


def test_ratios_are_of_medians_and_of_the_best_setting() -> None:
    found = ratios({"latency": LATENCY, "drain1": DRAIN})
    assert found["start_p50_vs_floor"] == 2.0
    assert found["start_p99_vs_floor"] == 3.0
    assert found["start_p50_vs_best_peer"] == 0.5  # of the least, as less is better
    assert found["drain1_vs_best_peer"] == 2.0
    assert found["drain1_vs_floor"] == 1.0  # the floor with batches of 100
    assert "drain2_vs_floor" not in found


def everything() -> Parts:
    """Of each figure that a ratio is made of, 1."""
    one: Figures = {
        "start_ms": {"outwake c10": [[1.0]], "floor b10": [[1.0]], "graphile best": [[1.0]]},
        "claim_ms": {"10 finished": [[1.0]], "10000000 finished": [[1.0]], "1000000 ready": [[1.0]]},
        "post_sessions_per_s": {name: [1.0] for name in ("bare", "bearer", "development", "api token")},
        "post_sessions_cpu_us": {name: [1.0] for name in ("bare", "bearer")},
        "workers10_per_s": {"outwake c10": [1.0]},
        "workers50_per_s": {"outwake c10": [1.0]},
    }
    for figure in ("drain1_per_s", "drain2_per_s", "drain1_warm_per_s", "drain2_warm_per_s"):
        one[figure] = {"outwake c500": [1.0], "floor b100": [1.0], "graphile best": [1.0]}
    ways = ("no trigger", "outwake, busy", "outwake, working", "always notifying", "graphile best")
    for kind in ("enqueue8", "enqueue32", "library8", "library32"):
        one[f"{kind}_per_s"] = {name: [1.0] for name in ways}
    idle = {"queries": 0, "cpu_s": 0.01, "rss_mb": 50.5, "seconds": 600.0}
    streams = {"lost": 0, "twice": 1, "listen_connections": 1, "count": 2000, "kb_per_stream": 30.0}
    streams |= {"messages_per_s": 2000, "p50_ms": 1, "p99_ms": 2, "cpu_us_per_message": 100}
    return {"latency": part(one, idle=idle, streams=streams)}


def test_every_goal_has_its_figure() -> None:
    assert measured(everything()).keys() >= GOALS.keys()


def test_the_lines_have_the_names_that_scripts_look_for() -> None:
    found = list(lines(everything()))
    for name in (
        "start_p50_vs_floor",
        "start_p99_vs_floor",
        "drain1_vs_best_peer",
        "drain1_vs_floor",
        "drain2_vs_best_peer",
        "enqueue8_vs_plain_insert",
        "enqueue32_vs_plain_insert",
        "post_sessions_vs_bare_route",
        "claim_10m_done_vs_empty",
    ):
        assert f"ratio {name} 1.00" in found
    assert "idle queries 0 cpu_s 0.01 rss_mb 50.5" in found


@pytest.mark.parametrize(
    ("name", "value", "reached"),
    [
        ("start_p50_vs_floor", 1.15, True),
        ("start_p50_vs_floor", 1.16, False),
        ("start_p50_vs_best_peer", 1.0, False),
        ("drain1_vs_best_peer", 1.2, True),
        ("drain1_vs_best_peer", 1.19, False),
    ],
)
def test_goals(name: str, value: float, reached: bool) -> None:
    assert GOALS[name].reached(value) is reached


def test_the_page_says_what_was_reached_when_and_by_what(tmp_path: Path) -> None:
    failing = part({}, at="2026-01-03 00:00")
    failing["failed"] = ["dbos best: TimeoutError: not done in time"]
    write({"drain1": DRAIN, "idle": failing, "latency": LATENCY}, tmp_path)
    page = (tmp_path / "benchmarks.md").read_text()
    assert "| start_p50_vs_floor | 2 | ≤ 1.15 | **no** |" in page
    assert "| drain1_vs_best_peer | 2 | ≥ 1.2 | yes |" in page
    assert "| outwake c500 | 200 | 100 to 300 | 1.00 |\n| floor b100 | 200 | 200 | 1.00 |" in page
    assert page.index("| latency | 2026-01-01") < page.index("| drain1 | 2026-01-02")
    drain = "python -m bench all --only drain1 --rounds 2 --rows 100 --again 1"
    assert f"| drain1 | 2026-01-02 00:00 | abc1234 | `{drain}` |" in page
    assert "dbos best: TimeoutError" in page


def test_plots_are_the_same_for_the_same_values(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="only `make bench` needs it")
    values = {"outwake c10": Seen(1.0, 0.9, 1.1), "pgboss default": Seen(1000.0, 900.0, 1100.0)}
    texts = []
    for name in ("one.svg", "two.svg"):
        assert plot(tmp_path / name, "Latency", values)
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1]
    assert "pgboss default" in texts[0]
    assert "logarithmic" in texts[0]
    assert len(texts[0]) < 30_000


def test_state_is_never_where_git_would_see_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / ".gitignore").write_text(".state/\n")
    monkeypatch.chdir(tmp_path)
    assert state_directory("") == tmp_path / ".state/bench"
    assert state_directory(".state/other") == tmp_path / ".state/other"
    for seen in (".", "bench", str(tmp_path / "not/yet")):
        with pytest.raises(SystemExit) as refused:
            state_directory(seen)
        assert refused.value.code == 2


def test_state_may_be_outside_of_any_repository(tmp_path: Path) -> None:
    assert state_directory(str(tmp_path / "state")) == tmp_path / "state"
