"""`python -m bench [quick|all|report]`: measures the contestants interleaved, writes JSON, table and plots.

Each part that was run takes the place of the earlier one of its name in the result, so that parts can be run
one after another; `report` writes the page from what is there.
"""

import argparse
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench import workloads
from bench.contestant import CONTESTANTS, ROOT, Contestant, by_name, install
from bench.http import APIS, post_sessions
from bench.report import DOCS, lines, write
from bench.result import FASTEST, SAMPLED, Part, collected, load, save
from bench.server import SETTINGS, STATE, Server
from bench.streams import streams

QUICK = {
    "latency": ["outwake c10", "floor b10", "graphile best"],
    "drain": list(FASTEST),
}

ONE_A_POLL = ("dbos default", "pgboss default")
"""Their defaults poll every second or two: ten samples tell, and a drain would take hours."""
SLOW = ("dbos_.py", "procrastinate_.py")
"""A few hundred jobs a second at best."""
AT_ONCE = ("outwake", "floor", "graphile")
"""Whose queue is filled in one transaction, so that a worker at work can be measured from its first row."""

DEFAULTS: list[tuple[str, float, float, str]] = [
    ("rounds", 2, 5, "how often each is measured"),
    ("rows", 20_000, 20_000, "rows drained"),
    ("again", 2, 2, "drains of the same, by then warm, workers"),
    ("samples", 150, 500, "latencies measured a round"),
    ("seconds", 4, 10, "of each enqueue and HTTP run"),
    ("finished", 500_000, 10_000_000, "finished rows beside a claim"),
    ("held", 0, 180, "seconds of the phases around a held snapshot"),
    ("streams", 200, 2000, "event streams at once"),
    ("stream-seconds", 5, 30, "of a message a second in each"),
    ("idle", 10, 600, "seconds that an idle worker is watched"),
]
"""Name, value when quick and when all, meaning."""


class Run:
    """A server, what is to be measured, and what has been."""

    def __init__(self, server: Server, arguments: argparse.Namespace) -> None:
        self.server = server
        self.arguments = arguments
        self.quick = arguments.extent == "quick"
        self.parts: dict[str, Part] = {}

    def begin(self, name: str) -> None:
        """From here on all is of this part."""
        if name not in self.parts:
            self.parts[name] = {
                "at": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
                "commit": _commit(),
                "arguments": {k: v for k, v in vars(self.arguments).items() if k not in ("json", "only")},
                "machine": {
                    "cores": len(os.sched_getaffinity(0)),
                    "system": platform.platform(),
                    "python": platform.python_version(),
                },
                "server": {"version": self.server.version(), **SETTINGS},
                "figures": collected(),
                "once": {},
                "failed": [],
            }
        self._part = self.parts[name]

    def measure(self, who: str, measured: Callable[..., Any], *arguments: Any) -> None:
        """Add a round of a contestant's figures. A failure is a result too, not the end."""
        try:
            found = measured(*arguments)
        except Exception as error:
            self.failed(who, error)
            return
        for figure, value in found.items():
            self.add(figure, who, value)

    def add(self, figure: str, who: str, value: Any) -> None:
        rounds = self._part["figures"][figure][who]
        if isinstance(value, list) and figure not in SAMPLED:
            rounds.extend(value)
        else:
            rounds.append(value)

    def once(self, name: str, measured: Callable[..., Any], *arguments: Any) -> None:
        try:
            self._part["once"][name] = measured(*arguments)
        except Exception as error:
            self.failed(name, error)

    def failed(self, who: str, error: Exception) -> None:
        text = f"{who}: {type(error).__name__}: {str(error)[-300:]}"
        self._part["failed"].append(text)
        _say(text)

    def chosen(self, workload: str = "drain") -> list[Contestant]:
        """In random order: whoever comes first would meet another machine than whoever comes last."""
        names = self.arguments.contestants or (
            QUICK[workload] if self.quick else [c.name for c in CONTESTANTS]
        )
        return random.sample([by_name(name) for name in names], len(names))


def main() -> None:
    arguments = _arguments()
    if arguments.extent == "report":
        parts = load(arguments.json)
        if not parts:
            sys.exit(f"{arguments.json} has no result: run `python -m bench all` first")
        write(parts, DOCS)
        return
    names = arguments.only or [n for n in PARTS if not (arguments.extent == "quick" and n in _NOT_QUICK)]
    if not set(names) <= _ALONE and (
        arguments.contestants is None or any(by_name(name).peer for name in arguments.contestants)
    ):
        install()
    with Server.running() as server:
        measured = Run(server, arguments)
        _rounds(measured, [name for name in names if name not in _ONCE], arguments.rounds)
        _rounds(measured, [name for name in names if name in _ONCE], 1)
    for line in lines(measured.parts):
        print(line)
    if arguments.extent == "all":
        write(load(arguments.json), DOCS)


def _rounds(measured: Run, names: Iterable[str], count: int) -> None:
    started = time.monotonic()
    for number in range(count):
        for name in names:
            measured.begin(name)
            PARTS[name](measured)
            _say(f"round {number + 1}: {name} done after {time.monotonic() - started:.0f} s")
        save(measured.arguments.json, measured.parts)  # hours of work, if it is ended now


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("extent", choices=["quick", "all", "report"], nargs="?", default="quick")
    add("--only", type=_listed(PARTS), help=f"some of {','.join(PARTS)}")
    add("--contestants", type=_listed([c.name for c in CONTESTANTS]), help="by name, as the tables have them")
    add("--json", type=Path, help="where the result is (.state/bench/result.json, when quick quick.json)")
    for name, quick, full, meaning in DEFAULTS:
        add(f"--{name}", type=type(full), help=f"{meaning} (quick {quick}, all {full})")
    found = parser.parse_args()
    if found.json is None:
        found.json = STATE / ("quick.json" if found.extent == "quick" else "result.json")
    for name, quick, full, _ in DEFAULTS:
        name = name.replace("-", "_")
        if getattr(found, name) is None:
            setattr(found, name, quick if found.extent == "quick" else full)
    return found


def _listed(known: Iterable[str]) -> Callable[[str], list[str]]:
    def listed(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}")
        return names

    return listed


# The parts


def _latency(run: Run) -> None:
    for contestant in run.chosen("latency"):
        samples = 10 if contestant.name in ONE_A_POLL else run.arguments.samples
        run.measure(contestant.name, workloads.start_latency, run.server, contestant, samples)


def _drain(workers: int) -> Callable[[Run], None]:
    def drain(run: Run) -> None:
        rows = run.arguments.rows
        for contestant in run.chosen():
            if contestant.name in ONE_A_POLL:
                continue
            # A twentieth is enough to tell.
            slow = (contestant.variant == "default" and contestant.peer) or contestant.script in SLOW
            count = rows // 20 if slow else rows
            again = run.arguments.again if contestant.name.startswith(AT_ONCE) else 0
            run.measure(contestant.name, workloads.drain, run.server, contestant, count, workers, again)

    return drain


def _inserts(
    kind: str, working: Callable[..., workloads.Figures], counts: Callable[[Contestant], bool]
) -> Callable[[Run], None]:
    """`counts`: which peers, each at its best, are measured beside Outwake while a worker takes the rows."""

    def inserts(run: Run) -> None:
        seconds = run.arguments.seconds
        for clients in (8, 32):
            figure = f"{kind}{clients}_per_s"
            try:
                for way, rate in workloads.inserts(run.server, kind, clients, seconds).items():
                    run.add(figure, way, rate)
            except Exception as error:
                run.failed(figure, error)
            peers = [c for c in run.chosen() if c.peer and c.variant == "best" and counts(c)]
            if run.quick and run.arguments.contestants is None:
                continue
            for contestant in random.sample([by_name(FASTEST[0]), *peers], len(peers) + 1):
                name = contestant.name if contestant.peer else "outwake, working"
                run.measure(name, working, run.server, contestant, clients, seconds)

    return inserts


def _http(run: Run) -> None:
    names = ("bare", "bearer") if run.quick else APIS
    try:
        found = post_sessions(run.server, names, run.arguments.seconds)
    except Exception as error:
        run.failed("post_sessions", error)
        return
    for name, figures in found.items():
        for figure, value in figures.items():
            run.add(figure, name, value)


def _workers(run: Run) -> None:
    rows = 3 * run.arguments.rows  # so that what it takes 50 processes to wake, 0.3 s, is little of it
    for workers in random.sample((10, 50), 2):
        run.measure("outwake c10", workloads.many_workers, run.server, workers, rows)


def _claims(run: Run) -> None:
    finished = run.arguments.finished
    sizes = {
        "10 finished": (10, 2000),
        f"{finished:,} finished": (finished, 2000),
        f"{finished // 10:,} ready": (10, finished // 10),
    }
    for name, rounds in workloads.claim_cost(run.server, sizes).items():
        for samples in rounds:
            run.add("claim_ms", name, samples)


def _idle(run: Run) -> None:
    run.once("idle", workloads.idle, run.server, run.arguments.idle)


def _streams(run: Run) -> None:
    run.once("streams", streams, run.server, run.arguments.streams, run.arguments.stream_seconds)


def _held(run: Run) -> None:
    for contestant in (by_name(FASTEST[0]), by_name("floor b100")):
        name = f"held {contestant.name}"
        run.once(name, workloads.held_snapshot, run.server, contestant, run.arguments.held)


PARTS: dict[str, Callable[[Run], None]] = {
    "latency": _latency,
    "drain1": _drain(1),
    "drain2": _drain(2),
    "enqueue": _inserts("enqueue", workloads.enqueue_working, lambda c: c.insert is not None),
    "library": _inserts("library", workloads.library_working, lambda c: c.notifies),
    "http": _http,
    "workers": _workers,
    "claim": _claims,
    "idle": _idle,
    "streams": _streams,
    "held": _held,
}
_ONCE = {"claim", "idle", "streams", "held"}
_ALONE = {"http", "workers", *_ONCE}
"""Parts without peers."""
_NOT_QUICK = {"library", "workers", "held"}
"""Left out of the quick run, unless asked for by --only."""


def _commit() -> str:
    """What was measured. The page that a part writes does not make it another."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ".", ":!docs"], check=False).returncode
    return head.stdout.strip() + (" and changes" if changed else "")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
