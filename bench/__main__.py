"""`python -m bench [quick|all]`: runs the contestants interleaved, writes JSON, table and plots."""

import argparse
import platform
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import workloads
from bench.contestant import CONTESTANTS, Contestant, by_name, install
from bench.http import APIS, post_sessions
from bench.report import write
from bench.server import SETTINGS, STATE, Server
from bench.streams import streams

Results = dict[str, dict[str, list[float]]]
"""By figure, by contestant: one value a round."""

_ALONE = {"http", "claim", "idle", "streams"}
"""Parts without peers."""

QUICK = {
    "latency": ["sendoff c10", "floor b10", "graphile best"],
    "drain": ["sendoff c500", "floor b100", "graphile best"],
}
"""Graphile-worker has been the best peer in every run of all."""


ONE_A_POLL = ("dbos default", "pgboss default")
"""Their defaults poll every second or two: ten samples tell, and a drain would take hours."""


def main() -> None:
    arguments = _arguments()
    if arguments.only is None or not set(arguments.only) <= _ALONE:
        install()
    figures: Results = defaultdict(lambda: defaultdict(list))
    one: dict[str, Any] = {}
    with Server.running() as server:
        started = time.monotonic()
        usual = [n for n in _ROUNDS if arguments.extent == "all" or n not in _NOT_QUICK]
        rounds = [name for name in arguments.only or usual if name in _ROUNDS]
        for number in range(arguments.rounds):
            for name in rounds:
                _ROUNDS[name](server, figures, arguments)
                _say(f"round {number + 1}: {name} done after {time.monotonic() - started:.0f} s")
        if arguments.only is None or "claim" in arguments.only:
            _claims(server, figures, arguments)
        if arguments.only is None or "idle" in arguments.only:
            one["idle"] = workloads.idle(server, arguments.idle)
        if arguments.streams and (arguments.only is None or "streams" in arguments.only):
            one["streams"] = streams(server, arguments.streams, arguments.stream_seconds)
        if arguments.held and (arguments.only is None or "held" in arguments.only):
            for contestant in (_best(), by_name("floor b100")):
                one[f"held {contestant.name}"] = workloads.held_snapshot(server, contestant, arguments.held)
        version = server.version()
    result = {
        "at": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "machine": {"cores": _cores(), "system": platform.platform(), "python": platform.python_version()},
        "server": {"version": version, **SETTINGS},
        "arguments": {k: v for k, v in vars(arguments).items() if k != "json"},
        "figures": figures,
        "once": one,
    }
    write(result, arguments.json)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    add = parser.add_argument
    add("extent", choices=["quick", "all"], nargs="?", default="quick")
    add("--rounds", type=int, help="how often each is measured (quick 2, all 5)")
    add("--rows", type=int, default=20_000, help="rows drained")
    add("--samples", type=int, help="latencies measured (quick 100, all 500)")
    add("--seconds", type=int, help="of each enqueue run (quick 3, all 10)")
    add("--finished", type=int, help="finished rows beside a claim (quick 500000, all 10000000)")
    add("--held", type=float, help="seconds of the phases around a held snapshot (quick 0: none, all 180)")
    add("--streams", type=int, help="event streams at once (quick 200, all 2000)")
    add("--stream-seconds", type=int, help="of a message a second in each (quick 5, all 30)")
    add("--idle", type=float, help="seconds that an idle worker is watched (quick 10, all 600)")
    add(
        "--only",
        type=lambda text: text.split(","),
        help="of latency,drain1,drain2,enqueue,library,http,workers,claim,idle,streams,held",
    )
    add("--json", type=Path, default=STATE / "result.json", help="where the result goes")
    found = parser.parse_args()
    quick = found.extent == "quick"
    for name, short, full in [
        ("rounds", 2, 5),
        ("samples", 100, 500),
        ("seconds", 3, 10),
        ("finished", 500_000, 10_000_000),
        ("held", 0, 180),
        ("idle", 10, 600),
        ("streams", 200, 2000),
        ("stream_seconds", 5, 30),
    ]:
        if getattr(found, name) is None:
            setattr(found, name, short if quick else full)
    return found


def _chosen(arguments: argparse.Namespace, workload: str = "drain") -> list[Contestant]:
    quick = arguments.extent == "quick"
    chosen = [by_name(name) for name in QUICK[workload]] if quick else list(CONTESTANTS)
    random.shuffle(chosen)  # whoever comes first would meet another machine than whoever comes last
    return chosen


def _best() -> Contestant:
    return by_name("sendoff c500")


def _latency(server: Server, figures: Results, arguments: argparse.Namespace) -> None:
    for contestant in _chosen(arguments, "latency"):
        slow = contestant.name in ONE_A_POLL
        _measure(
            figures,
            contestant,
            workloads.start_latency,
            server,
            contestant,
            10 if slow else arguments.samples,
        )


def _drain(workers: int) -> Any:
    def drain(server: Server, figures: Results, arguments: argparse.Namespace) -> None:
        for contestant in _chosen(arguments):
            if contestant.name in ONE_A_POLL:
                continue
            # A hundred jobs a second: a twentieth is enough to tell.
            slow = contestant.variant == "default" and contestant.peer
            count = arguments.rows // 20 if slow or contestant.script == "dbos_.py" else arguments.rows
            _measure(figures, contestant, workloads.drain, server, contestant, count, workers)

    return drain


def _inserts(measure: Any, modes: tuple[str, ...], counts: Callable[[Contestant], bool]) -> Any:
    """`counts`: which peers, each at its best, are measured too."""

    def inserts(server: Server, figures: Results, arguments: argparse.Namespace) -> None:
        for clients in (8, 32):
            runs = [(_best(), mode) for mode in modes]
            runs += [
                (c, "working") for c in _chosen(arguments) if c.peer and c.variant == "best" and counts(c)
            ]
            random.shuffle(runs)
            for contestant, mode in runs:
                name = contestant.name if contestant.peer else f"sendoff, {mode}"
                _measure(figures, name, measure, server, contestant, clients, arguments.seconds, mode)

    return inserts


def _http(server: Server, figures: Results, arguments: argparse.Namespace) -> None:
    for name in random.sample(APIS, len(APIS)):
        _measure(figures, name, post_sessions, server, name, arguments.seconds)


def _workers(server: Server, figures: Results, arguments: argparse.Namespace) -> None:
    for workers in (10, 50):
        _measure(figures, "sendoff c10", workloads.many_workers, server, workers, arguments.rows)


_ROUNDS = {
    "latency": _latency,
    "drain1": _drain(1),
    "drain2": _drain(2),
    "enqueue": _inserts(
        workloads.enqueue, ("plain", "busy", "working", "always"), lambda c: c.insert is not None
    ),
    "library": _inserts(workloads.enqueue_by_library, ("plain", "busy", "working"), lambda c: c.notifies),
    "http": _http,
    "workers": _workers,
}
_NOT_QUICK = {"library", "workers"}
"""Left out of the quick run, unless asked for by --only."""


def _claims(server: Server, figures: Results, arguments: argparse.Namespace) -> None:
    finished = arguments.finished
    sizes = {
        "10 finished": (10, 2000),
        f"{finished} finished": (finished, 2000),
        f"{finished // 10} ready": (10, finished // 10),
    }
    for name, milliseconds in workloads.claim_cost(server, sizes, 160).items():
        figures["claim_ms"][name].append(milliseconds)


def _measure(figures: Results, who: Contestant | str, measure: Any, *arguments: Any) -> None:
    name = who if isinstance(who, str) else who.name
    try:
        for figure, value in measure(*arguments).items():
            figures[figure][name].append(value)
    except Exception as error:  # one contestant's failure is a result, not the end
        _say(f"{name}: {type(error).__name__}: {str(error)[-300:]}")


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
