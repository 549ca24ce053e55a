"""The table of docs/scaling.md, and that no network is left behind."""

import os
import subprocess
from contextlib import suppress
from typing import Any

import pytest

from bench import network as net
from bench.contestant import ROOT
from bench.scaling import full, put, table
from bench.server import children_cpu_seconds, machine_cpu_seconds


def test_the_page_has_its_marks() -> None:
    page = (ROOT / "docs/scaling.md").read_text()
    once = put(page, "new text")
    assert "new text" in once
    assert put(once, "newer text") == once.replace("new text", "newer text")
    with pytest.raises(AssertionError, match="marks"):
        put("nothing", "new text")


def test_the_table_shows_medians_over_the_rounds() -> None:
    def one(rate: float) -> dict[str, float]:
        return {"per_s": rate, "server": 0.5, "processes": 1.0, "busiest": 0.9, "load": 0.2, "others": 0.3}

    result: dict[str, Any] = {
        "arguments": {"rounds": 3},
        "at": "2026-01-01 00:00",
        "server": "18",
        "cores": 2,
        "hosts": "processes",
        "seen": {"1 host": [one(1000), one(3000), one(2000)], "1 API": [{**one(10), "busiest": 0.95}]},
    }
    lines = list(table(result))
    cores = "0.50 | 1.00 | 0.90 | 0.20 | 0.30"
    assert f"| 1 host | 2,000 (1,000 to 3,000) | {cores} | 250 | 500 | the machine |" in lines
    assert lines[-1].endswith("| 50,000 | 100,000 | a process |")
    assert full({**one(10), "others": 0.1}, 2) == "nothing: it waited"


def test_no_network_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net, "BRIDGE", "outwaketest")
    monkeypatch.setattr(net, "SUBNET", "198.18.78")
    with suppress(ZeroDivisionError), net.network(2) as made:
        assert len(made.hosts) == 2
        told = subprocess.run([*made.hosts[1].prefix, "echo", "here"], capture_output=True, check=True)
        assert told.stdout == b"here\n"
        raise ZeroDivisionError
    if made.hosts[0].prefix:
        for listed in (["ip", "netns", "list"], ["ip", "link"]):
            assert b"outwaketest" not in subprocess.run(listed, capture_output=True, check=True).stdout


def test_without_privileges_hosts_are_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with net.network(3) as made:
        assert made.hosts == [net.Host((), "127.0.0.1")] * 3
        assert made.server == "127.0.0.1"
        assert "only a process" in made.kind


def test_cpu_time_counts_children_that_have_ended() -> None:
    before, machine = children_cpu_seconds(os.getpid()), machine_cpu_seconds()
    busy = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run(["python3", "-c", busy], check=True)
    assert children_cpu_seconds(os.getpid()) >= before + 0.25
    assert machine_cpu_seconds() >= machine + 0.25
