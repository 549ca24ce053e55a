"""Side by side: `python -m bench.scaling`. API processes, worker hosts, databases; who uses the CPU.

1. API processes 1, 2, 4, each on a host of its own with a load generator beside it (bench/http.py: 16
   connections, users with API tokens): POST /sessions a second, all together.
2. Worker hosts 1, 2, 4, 8, each one worker of 100 slots. The queue is filled while they sleep, then all are
   woken at once: jobs a second from the first start to the last end.
3. The same rows over two databases of one server, each with its own host.

Of each: how many cores the server, the measured processes, the busiest of them, and the load used (/proc),
and how many everybody else on the machine; and the CPU time of a request or a row. Rounds are interleaved.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import psycopg

from bench.contestant import ROOT, by_name, run, wait_until, working
from bench.http import FASTEST, FILL, SESSIONS, accepts, api_tokens
from bench.network import Host, Network, network
from bench.server import STATE, Server, children_cpu_seconds, cpu_seconds, machine_cpu_seconds, settle
from bench.workloads import ASLEEP, OFF, ON, nothing_left
from bench.workloads import FILL as ROWS
from outwake.embedded.postgres import free_port
from outwake.schema import in_schema

APIS = (1, 2, 4)
LAYOUTS = {"1 host": [1], "2 hosts": [2], "4 hosts": [4], "8 hosts": [8], "2 hosts, 2 databases": [1, 1]}
"""Hosts, by database."""
WORKER = by_name("outwake c100")
Cores = dict[str, float]
"""A rate, and how many cores who used while it was measured."""


@contextmanager
def _cores(server: Server, pids: list[int], found: Cores) -> Iterator[None]:
    """What is used in the block, in cores: by the server, by these processes, by the busiest, by others."""

    def spent() -> list[float]:
        return [machine_cpu_seconds(), children_cpu_seconds(server.pid), *map(cpu_seconds, pids)]

    began, before = time.monotonic(), spent()
    yield
    took = time.monotonic() - began
    machine, by_server, *processes = [(now - then) / took for now, then in zip(spent(), before, strict=True)]
    found |= {"server": by_server, "processes": sum(processes), "busiest": max(processes), "load": 0.0}
    found["others"] = machine - by_server - sum(processes)


# API processes


def apis(server: Server, net: Network, count: int, seconds: int) -> Cores:
    """POST /sessions a second by so many API processes."""
    url = server.fresh("bench")
    run(WORKER, url, "setup")
    warm_up = FASTEST // SESSIONS
    each = warm_up + seconds * FASTEST // SESSIONS
    tokens = api_tokens(url, [f"user-{number}" for number in range(each * count)])
    with server.connect("bench") as conn:
        conn.execute(FILL)
        settle(conn)
    found: Cores = {}
    with ExitStack() as stack, ThreadPoolExecutor(count) as pool:
        there = [(host, free_port()) for host in net.hosts[:count]]
        processes = [
            stack.enter_context(_api(host, port, url.replace("127.0.0.1", net.server)))
            for host, port in there
        ]

        def load(first: int, users: int, lasting: int) -> list[tuple[float, float, float]]:
            waiting = [
                pool.submit(_load, *at, lasting, tokens[first + n * each :][:users])
                for n, at in enumerate(there)
            ]
            return [one.result() for one in waiting]

        load(0, warm_up, 1)
        with _cores(server, [process.pid for process in processes], found):
            answers = load(warm_up, each - warm_up, seconds)
    found["per_s"] = sum(count / took for count, took, _ in answers)
    found["load"] = sum(cpu / took for _, took, cpu in answers)
    found["others"] -= found["load"]
    return found


@contextmanager
def _api(host: Host, port: int, url: str) -> Iterator[subprocess.Popen[bytes]]:
    settings = {"OUTWAKE_HOST": host.address, "OUTWAKE_PORT": str(port), "OUTWAKE_REQUIRE_TOKEN": "1"}
    environment = {**os.environ, "DATABASE_URL": url, "OUTWAKE_LOG_LEVEL": "warning", **settings}
    command = [*host.prefix, sys.executable, "-c", "from outwake.cli import main; main(['api'])"]
    with (STATE / "api.log").open("ab") as log:
        process = subprocess.Popen(
            command, env={**environment, "PYTHONPATH": str(ROOT)}, cwd=ROOT, stdout=log, stderr=log
        )
        try:
            wait_until(lambda: accepts(port, host.address), timeout=30)
            yield process
        finally:
            process.terminate()
            process.wait(30)


def _load(host: Host, port: int, seconds: int, tokens: list[str]) -> tuple[float, float, float]:
    command = [*host.prefix, sys.executable, "-m", "bench.http", str(port), str(seconds), host.address]
    done = subprocess.run(
        command, cwd=ROOT, input=json.dumps(tokens), capture_output=True, text=True, timeout=seconds + 60
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    count, took, cpu = map(float, done.stdout.split())
    return count, took, cpu


# Worker hosts


def drain(server: Server, net: Network, layout: list[int], rows: int) -> Cores:
    """Jobs a second by so many hosts for each database; the rows are spread evenly over the databases."""
    databases = [f"bench_{number}" for number in range(len(layout))]
    hosts = iter(net.hosts)
    found: Cores = {}
    with ExitStack() as stack:
        conns, pids = [], []
        for database, count in zip(databases, layout, strict=True):
            url = server.fresh(database)
            run(WORKER, url, "setup")
            url = url.replace("127.0.0.1", net.server)
            conns.append(stack.enter_context(server.connect(database)))
            for host in (next(hosts) for _ in range(count)):
                pids.append(stack.enter_context(working(WORKER, url, prefix=host.prefix)).pid)
        for conn, count in zip(conns, layout, strict=True):
            _filled_in_their_sleep(conn, count, rows // len(layout))
        with _cores(server, pids, found):
            for conn in conns:
                conn.execute(in_schema("SELECT :schema.outbox_wake()"))
            for conn in conns:
                nothing_left(conn, WORKER)
        span = in_schema("SELECT min(started_at), max(finished_at) FROM :schema.outbox")
        spans = [conn.execute(span).fetchone() for conn in conns]
    for database in databases:
        server.drop(database)
    began, ended = min(s[0] for s in spans if s), max(s[1] for s in spans if s)
    return {"per_s": rows / (ended - began).total_seconds(), **found}


def _filled_in_their_sleep(conn: psycopg.Connection[object], workers: int, rows: int) -> None:
    wait_until(lambda: conn.execute(ASLEEP, (workers,)).fetchone())
    conn.execute(OFF.format("outbox_inserted"))
    conn.execute(ROWS, (rows,))
    conn.execute(ON.format("outbox_inserted"))
    settle(conn)


# The run


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=4, help="of each run of the API")
    parser.add_argument("--rows", type=int, default=40_000, help="drained in each run of workers")
    arguments = parser.parse_args()
    with network(8) as net, _reachable(net) as server:
        print(f"hosts: {net.kind}", flush=True)
        runs: dict[str, Callable[[], Cores]] = {
            f"{count} API": partial(apis, server, net, count, arguments.seconds) for count in APIS
        }
        for name, layout in LAYOUTS.items():
            runs[name] = partial(drain, server, net, layout, arguments.rows)
        seen: dict[str, list[Cores]] = {name: [] for name in runs}
        for _ in range(arguments.rounds):
            for name in random.sample(list(runs), len(runs)):
                seen[name].append(runs[name]())
                print(name, *(f"{key} {value:.2f}" for key, value in seen[name][-1].items()), flush=True)
        version = server.version()
    result = {
        "at": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "arguments": vars(arguments),
        "cores": len(os.sched_getaffinity(0)),
        "server": version,
        "hosts": net.kind,
        "seen": seen,
    }
    (STATE / "scaling.json").write_text(json.dumps(result, indent=1))
    page = ROOT / "docs/scaling.md"
    page.write_text(put(page.read_text(), "\n".join(table(result))))


@contextmanager
def _reachable(net: Network) -> Iterator[Server]:
    """The server, reachable from the hosts: their addresses are let in until the block ends."""
    addresses = ",".join(dict.fromkeys(["127.0.0.1", net.server]))
    with Server.running({"listen_addresses": addresses}) as server, server.connect("postgres") as conn:
        row = conn.execute("SHOW hba_file").fetchone()
        assert row is not None
        rules = Path(row[0])
        before = rules.read_text()
        try:
            rules.write_text(before + "".join(f"host all all {h.address}/32 trust\n" for h in net.hosts))
            conn.execute("SELECT pg_reload_conf()")
            yield server
        finally:
            rules.write_text(before)


# The page


def put(page: str, text: str) -> str:
    """The page with this text between its marks."""
    begin, end = "<!-- bench.scaling: -->\n", "<!-- :bench.scaling -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    assert pattern.search(page), "the page has lost its marks"
    return pattern.sub(lambda _: f"{begin}{text}\n{end}", page)


def table(result: dict[str, Any]) -> Iterator[str]:
    """Medians over the rounds, of the rate also the least and the greatest."""
    seen: dict[str, list[Cores]] = result["seen"]
    options = " ".join(f"--{name} {value}" for name, value in result["arguments"].items())
    yield f"`python -m bench.scaling {options}`, {result['at']} UTC, PostgreSQL {result['server']}, "
    yield f"{result['cores']} cores for everything; {result['hosts']}."
    yield ""
    columns = "a second, server, API or workers, busiest, load, others, server us, API or worker us, full"
    yield f"| | {columns.replace(', ', ' | ')} |"
    yield "|---" * 10 + "|"
    for name, rounds in seen.items():
        rates = [one["per_s"] for one in rounds]
        middle = {key: median(one[key] for one in rounds) for key in rounds[0]}
        cells = [f"{middle['per_s']:,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"]
        cells += [f"{middle[key]:.2f}" for key in ("server", "processes", "busiest", "load", "others")]
        cells += [f"{middle[key] / middle['per_s'] * 1e6:,.0f}" for key in ("server", "processes")]
        yield f"| {name} | {' | '.join(cells)} | {full(middle, result['cores'])} |"


def full(one: Cores, cores: int) -> str:
    """What had no CPU time left to give, if anything."""
    if one["busiest"] > 0.9:
        return "a process"
    if sum(one[key] for key in ("server", "processes", "load", "others")) > 0.95 * cores:
        return "the machine"
    return "nothing: it waited"


if __name__ == "__main__":
    main()
