"""A program that uses Outwake, as mypy sees it: the types of the package are found and hold."""

import subprocess
import sys
from pathlib import Path

from tests.support.process import ROOT
from tests.wheel.build import Built
from tests.wheel.environment import Environment
from tests.wheel.report import Report

_RIGHT = """\
import psycopg

from outwake import Handler, Job, Retry, enqueue


async def order(conn: psycopg.AsyncConnection) -> None:
    await enqueue(conn, "shop.mail", {"to": "you"}, priority=3)


def order_more(conn: psycopg.Connection) -> int:
    return enqueue(conn, "shop.mail", {"to": "you"})


async def send(job: Job) -> None:
    if "to" not in job.payload:
        raise Retry("later")


handler = Handler("shop.mail", send)
"""

_WRONG = """\
import psycopg

from outwake import Handler, Job, enqueue


async def order(conn: psycopg.AsyncConnection) -> None:
    await enqueue(conn, "shop.mail", {"to": "you"}, priorty=3)  # line 7


async def send(job: Job) -> None:
    print(job.paylod)  # line 11


handler = Handler(3, send)  # line 14


async def mixed_up(conn: psycopg.Connection, other: psycopg.AsyncConnection) -> None:
    await enqueue(conn, "shop.mail")  # line 18
    enqueue(other, "shop.mail")  # line 19
    enqueue("postgresql:", "shop.mail")  # line 20
"""


def check(built: Built, directory: Path, report: Report) -> None:
    """Against the wheel, and against an editable install."""
    right, wrong = directory / "right.py", directory / "wrong.py"
    right.write_text(_RIGHT)
    wrong.write_text(_WRONG)
    for name, arguments in (
        ("types, from the wheel", [str(built.wheel)]),
        ("types, outwake editable", ["--editable", str(ROOT)]),
    ):
        report.begin(name)
        environment = Environment(directory / f"typed-{len(arguments)}")
        environment.install(*arguments)
        lines = _mypy(environment, right, wrong)
        errors = {tuple(line.split(":")[:2]) for line in lines if ": error:" in line}
        expected = {("wrong.py", line) for line in ("7", "11", "14", "18", "19", "20")}
        report.that("mypy finds the six mistakes alone", errors == expected, "\n".join(lines))
        report.that("mypy names the misspelt argument", any("priorty" in line for line in lines), lines)


def _mypy(environment: Environment, *files: Path) -> list[str]:
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "", "--no-error-summary"]
    command += ["--python-executable", str(environment.python), "--cache-dir", f"{environment.site}/.mypy"]
    directory = files[0].parent
    done = subprocess.run(
        [*command, *(file.name for file in files)], cwd=directory, capture_output=True, text=True, check=False
    )
    return (done.stdout + done.stderr).splitlines()
