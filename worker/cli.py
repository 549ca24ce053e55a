"""The `worker` command."""

import argparse
import asyncio
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import uvloop

from outwake.cli.parser import Parser
from outwake.errors import ConfigurationError, SchemaError
from outwake.handler import Handler, installed_handlers
from outwake.lean import collect_seldom
from outwake.settings import Settings, load
from outwake.telemetry import log, trace
from outwake.worker.agents.usage import declare_usage
from outwake.worker.engine import health
from outwake.worker.engine.processes import Parent, ParentLink
from outwake.worker.engine.worker import Worker

if TYPE_CHECKING:
    from outwake.worker.handlers.relay import Relay


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. The exit status is 0 after a drain, 1 on a failure, 2 on a usage error."""
    try:
        sys.exit(_main(_parser().parse_args(argv), list(sys.argv[1:] if argv is None else argv)))
    except (ConfigurationError, SchemaError, OSError) as error:
        print(f"worker: {error}", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="worker",
        description="Claims outbox rows and runs their handlers until SIGTERM. Options: docs/worker.md.",
    )
    add = parser.add_argument
    add("--concurrency", type=_positive, default=10, metavar="N", help="rows run at once (10)")
    add("--topics", metavar="A,B", help="serve only these topics; default: all that have a handler")
    add("--processes", type=_positive, default=1, metavar="N", help="worker processes (1)")
    add("--check", action="store_true", help="ask the worker on this host whether it is ready, and exit")
    add("--parent", type=int, help=argparse.SUPPRESS)
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 10000:
        raise argparse.ArgumentTypeError("must be between 1 and 10000")
    return number


def _main(arguments: argparse.Namespace, argv: list[str]) -> int:
    settings = load()
    if arguments.check:
        return _check(settings)
    log.configure(level=settings.log_level)
    log.hide(settings.secrets)
    trace.configure("outwake-worker")
    try:
        return _start(arguments, argv, settings)
    finally:
        trace.shutdown()


def _start(arguments: argparse.Namespace, argv: list[str], settings: Settings) -> int:
    declare_usage()
    relay = _relay(settings)
    handlers, refused = _able(_choose(_all_handlers(relay), arguments.topics))
    if arguments.processes > 1 and arguments.parent is None:
        children = Parent(settings, arguments.processes, _without_processes(argv))
        return uvloop.run(_supervise(settings, children, refused))
    # The objects of the start stay. A batch of rows makes thousands of objects, which the reference count
    # frees. So the collector would cost time for little.
    collect_seldom()
    uvloop.run(_work(settings, handlers, relay, refused, arguments.concurrency, arguments.parent))
    return 0


def _check(settings: Settings) -> int:
    if settings.health_port is None:
        raise ConfigurationError("--check needs OUTWAKE_HEALTH_PORT")
    if problem := health.check(settings.health_host, settings.health_port):
        print(f"worker: {problem}", file=sys.stderr)
        return 1
    return 0


def _relay(settings: Settings) -> "Relay | None":
    """Import the relay only if a setting asks for it: its client takes memory, and is an extra."""
    if not settings.relay_topics:
        return None
    try:
        from outwake.worker.handlers.relay import Relay
    except ImportError as error:
        raise ConfigurationError(
            f"OUTWAKE_RELAY_TOPICS is set, but {error.name} is missing: pip install 'outwake[relay]'"
        ) from None
    return Relay(settings)


def _all_handlers(relay: "Relay | None") -> Mapping[str, Handler]:
    installed = installed_handlers()
    relayed = {} if relay is None else relay.handlers
    if taken := sorted(installed.keys() & relayed.keys()):
        raise ConfigurationError(f"OUTWAKE_RELAY_TOPICS: {taken[0]} has a handler already")
    return {**installed, **relayed}


def _choose(installed: Mapping[str, Handler], topics: str | None) -> Mapping[str, Handler]:
    if topics is None:
        return installed
    chosen = [name.strip() for name in topics.split(",")]
    if unknown := [name for name in chosen if name not in installed]:
        raise ConfigurationError(
            f"no handler for the topic {unknown[0]!r}; there are: {', '.join(sorted(installed))}"
        )
    return {name: installed[name] for name in chosen}


def _able(handlers: Mapping[str, Handler]) -> tuple[dict[str, Handler], dict[str, str]]:
    """The handlers that can work here, and why the others cannot, by topic."""
    checked = ((topic, handler.check and handler.check()) for topic, handler in handlers.items())
    refused = {topic: problem for topic, problem in checked if problem}
    if refused and len(refused) == len(handlers):
        raise ConfigurationError(next(iter(refused.values())))
    for topic, problem in refused.items():
        log.get_logger(__name__).error("topic_not_served", topic=topic, reason=problem)
    return {topic: handler for topic, handler in handlers.items() if topic not in refused}, refused


def _without_processes(argv: list[str]) -> list[str]:
    """The arguments of the children. The parent answers the health checks."""
    kept, skip = [], False
    for word in argv:
        if skip or word == "--processes" or word.startswith("--processes="):
            skip = word == "--processes"
            continue
        kept.append(word)
    return kept


async def _work(
    settings: Settings,
    handlers: Mapping[str, Handler],
    relay: "Relay | None",
    refused: Mapping[str, str],
    concurrency: int,
    parent: int | None,
) -> None:
    worker = Worker(settings, handlers, concurrency)
    _on_signals(worker.drain)
    link = None if parent is None else await ParentLink.open(parent, worker.drain, worker.snapshot)
    if link is not None:
        worker.report = link.report
    server = None
    if settings.health_port is not None and parent is None:
        server = await health.serve(
            settings, health.Source(_telling(worker.readiness, refused), worker.snapshot)
        )
        log.get_logger(__name__).info("health_ready", port=server.sockets[0].getsockname()[1])
    try:
        await worker.run()
    finally:
        if relay is not None:
            await relay.close()
        if server is not None:
            server.close()
        if link is not None:
            link.close()


def _telling(
    readiness: Callable[[], dict[str, Any]], refused: Mapping[str, str]
) -> Callable[[], dict[str, Any]]:
    """The readiness, with the topics that this worker does not serve though it has a handler, and why."""
    return lambda: {**readiness(), "not_served": dict(refused)} if refused else readiness()


async def _supervise(settings: Settings, parent: Parent, refused: Mapping[str, str]) -> int:
    _on_signals(parent.drain)
    server = None
    if settings.health_port is not None:
        server = await health.serve(
            settings, health.Source(_telling(parent.readiness, refused), parent.snapshot)
        )
        log.get_logger(__name__).info("health_ready", port=server.sockets[0].getsockname()[1])
    status = await parent.run()
    if server is not None:
        server.close()
    return status


def _on_signals(drain: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, drain)
