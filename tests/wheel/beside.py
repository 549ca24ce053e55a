"""Outwake beside an application with packages of the same names: neither touches the other."""

from collections.abc import Callable
from pathlib import Path

from tests.support.process import ROOT
from tests.wheel.application import TOPIC, Application
from tests.wheel.build import Built
from tests.wheel.environment import Environment
from tests.wheel.report import Report

Step = Callable[[Environment], None]


def check(built: Built, application: Application, directory: Path, report: Report) -> None:
    """Each order in which the two can be installed."""
    wheel = f"{built.wheel}[worker]"
    source = str(application.source)
    orders: dict[str, list[Step]] = {
        "the application before outwake": [lambda e: e.install(source), lambda e: e.install(wheel)],
        "the application after outwake": [lambda e: e.install(wheel), lambda e: e.install(source)],
        "the application editable": [lambda e: e.install(wheel), lambda e: e.install("--editable", source)],
        "outwake editable": [
            lambda e: e.install(source),
            lambda e: e.install("--editable", f"{ROOT}[worker]"),
        ],
        "both editable": [
            lambda e: e.install("--editable", f"{ROOT}[worker]"),
            lambda e: e.install("--editable", source),
        ],
    }
    for number, (name, steps) in enumerate(orders.items()):
        report.begin(name)
        environment = Environment(directory / f"beside-{number}")
        first, second = steps
        first(environment)
        before = application.files(environment)
        second(environment)
        after = application.files(environment)
        touched = [path for path, digest in before.items() if after.get(path) != digest]
        report.same("files of the application that were touched", touched, [])
        report.same("files of outwake that were changed", environment.changed("outwake"), [])
        _check_both(environment, application, report)
        _check_removal(environment, application, report)


def _check_both(environment: Environment, application: Application, report: Report) -> None:
    report.same("whose the application's modules are", application.owners(environment), {"shop"})
    ours = _home(environment, "outwake.worker.cli"), _home(environment, "outwake.sql")
    report.that("our repository's root is not on the path", environment.code("import bench").returncode != 0)
    report.that("our modules are in outwake/", all("/outwake/" in path for path in ours), ours)
    for cwd in (None, application.source):
        check_help(environment, report, cwd)
    for cwd in (None, application.source):
        done = environment.command("worker", "--topics", "none.such", cwd=cwd)
        topics = done.stderr.partition("there are: ")[2]
        good = done.returncode == 2 and TOPIC in topics and "session.run" in topics
        report.that(f"the worker finds {TOPIC}, and its own topics", good, done.stderr)


def check_help(environment: Environment, report: Report, cwd: Path | None = None) -> None:
    """Our commands start, in a folder that may have packages of the same names."""
    for name, *arguments in (["outwake"], ["worker"], ["outwake", "worker"]):
        done = environment.command(name, *arguments, "--help", cwd=cwd)
        what = " ".join([name, *arguments, "--help"])
        expected = "--concurrency" if "worker" in what else "usage: outwake"
        good = done.returncode == 0 and expected in done.stdout
        report.that(f"{what} in {cwd or 'another folder'}", good, done.stdout + done.stderr)


def _check_removal(environment: Environment, application: Application, report: Report) -> None:
    before = application.files(environment)
    environment.uninstall("outwake")
    report.same("the application's files without outwake", application.files(environment), before)
    report.same("whose its modules are without outwake", application.owners(environment), {"shop"})
    left = [path.name for path in environment.site.iterdir() if "outwake" in path.name]
    left += [name for name in ("outwake", "worker") if (environment.python.parent / name).exists()]
    report.same("what is left of outwake", left, [])
    report.that("outwake is gone", environment.code("import outwake").returncode != 0)


def _home(environment: Environment, module: str) -> str:
    return environment.code(f"import {module} as m; print(m.__file__)").stdout.strip()
