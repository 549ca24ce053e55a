"""The core alone, and each command with and without its extra."""

import json
from pathlib import Path

from tests.wheel import beside
from tests.wheel.build import Built, image_extras
from tests.wheel.environment import EXTRAS, Environment
from tests.wheel.report import Report

_LIGHT = """
import json, sys
import outwake, outwake._enqueue
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""

_EVERY = """
import importlib, pkgutil, sys, outwake
pending, failed = ["outwake"], []
while pending:
    name = pending.pop()
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        failed.append(f"{name}: {error}")
        continue
    for found in pkgutil.iter_modules(getattr(module, "__path__", [])):
        inner = f"{name}.{found.name}"
        if found.name != "__main__" and not inner.startswith(tuple(sys.argv[1:])):
            pending.append(inner)
sys.exit("\\n".join(failed) or 0)
"""

_NO_BINARY = {"PSYCOPG_IMPL": "binary"}  # psycopg finds no libpq, also where the system has one

_RELAY = ["outwake.worker.handlers.jetstream", "outwake.worker.handlers.relay"]
_EMBEDDED = ["outwake.embedded"]


def check(built: Built, directory: Path, report: Report) -> None:
    """From the core to what the image has."""
    environment = Environment(directory / "core")
    report.begin("the core")
    environment.install(built.wheel)
    _check_core(environment, report)
    report.begin("the extra cli")
    environment.install(f"{built.wheel}[cli]")
    _check_cli(environment, report)
    report.begin("the extra worker")
    environment = Environment(directory / "worker")
    environment.install(f"{built.wheel}[worker]")
    beside.check_help(environment, report)
    _check_modules(environment, report, "outwake.app", *_RELAY, *_EMBEDDED)
    _says(environment, report, "outwake api", "outwake[api]")
    report.begin("the extra api")
    environment = Environment(directory / "api")
    environment.install(f"{built.wheel}[api]")
    report.that("outwake api --help", environment.command("outwake", "api", "--help").returncode == 0)
    _check_modules(environment, report, "outwake.worker", *_EMBEDDED)
    report.begin("what the image has")
    report.same("the extras of the image", image_extras(), EXTRAS)
    environment = Environment(directory / "image")
    environment.install(f"{built.context}[{image_extras()}]")
    beside.check_help(environment, report)
    _check_modules(environment, report, *_EMBEDDED)


def _check_core(environment: Environment, report: Report) -> None:
    names = environment.distributions()
    report.that("psycopg alone comes along", names <= {"outwake", "psycopg", "typing_extensions"}, names)
    _says(environment, report, "outwake", "needs libpq: pip install 'outwake[cli]'", _NO_BINARY)
    done = environment.code("from outwake import enqueue", env=_NO_BINARY)
    report.that("enqueue is there without libpq", done.returncode == 0, done.stderr)
    done = environment.code("from outwake import migrate", env=_NO_BINARY)
    report.that("without libpq migrate says what to install", "'psycopg[binary]'" in done.stderr, done.stderr)
    environment.install("psycopg[binary]")  # as an application does
    loaded = set(json.loads(environment.code(_LIGHT).stdout or "[]"))
    report.that("enqueue is there", "psycopg" in loaded)
    heavy = {"structlog", "pydantic", "httpx", "starlette", "uvicorn", "rich", "prometheus_client", "uvloop"}
    report.same("what enqueueing must not load", loaded & heavy, set())
    _says(environment, report, "outwake migrate", "outwake[cli]")
    _says(environment, report, "worker", "outwake[worker]")
    _says(environment, report, "outwake worker", "outwake[worker]")
    _says(environment, report, "outwake api", "outwake[api]")
    _says(environment, report, "python -m outwake", "outwake[cli]")


def _check_cli(environment: Environment, report: Report) -> None:
    for words in ("--help", "migrate --help", "status --help", "tail --help", "token --help"):
        done = environment.command("outwake", *words.split())
        report.that(f"outwake {words}", done.returncode == 0 and "usage: outwake" in done.stdout, done.stderr)
    _says(environment, report, "worker --help", "outwake[worker]")
    _says(environment, report, "outwake worker --help", "outwake[worker]")
    _says(environment, report, "outwake api", "outwake[api]")


def _check_modules(environment: Environment, report: Report, *but: str) -> None:
    """Every module can be imported, so that the extra has all that is needed later on."""
    done = environment.command("python", "-P", "-c", _EVERY, *but)
    report.that("every module can be imported", done.returncode == 0, done.stderr)


def _says(
    environment: Environment, report: Report, command: str, text: str, env: dict[str, str] | None = None
) -> None:
    """The command prints one line with this text, and exits 2."""
    name, *arguments = command.split()
    done = environment.command(name, *arguments, env=env)
    good = done.returncode == 2 and done.stderr.count("\n") == 1 and text in done.stderr
    report.that(f"{command} names {text}", good and not done.stdout, done.stderr + done.stdout)
