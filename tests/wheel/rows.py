"""A row that the core enqueued is run by a worker beside the application, on a real Postgres."""

import signal
import subprocess
import threading
from pathlib import Path

import psycopg

from outwake.embedded.postgres import EmbeddedPostgres
from tests.support.server import SETTINGS
from tests.wheel.application import TOPIC, Application
from tests.wheel.build import Built
from tests.wheel.environment import Environment
from tests.wheel.report import Report

_ENQUEUE = f"""
import asyncio, os, psycopg
from outwake import enqueue

async def main():
    async with await psycopg.AsyncConnection.connect(os.environ["DATABASE_URL"]) as conn:
        await enqueue(conn, "{TOPIC}", {{"to": "you"}})

asyncio.run(main())
"""

_PATIENCE = 60.0  # seconds


def check(built: Built, application: Application, directory: Path, report: Report) -> None:
    """Migrate, enqueue and work, each by what is installed for it."""
    report.begin("rows, from the core to the application's handler")
    producer, consumer = Environment(directory / "producer"), Environment(directory / "consumer")
    producer.install(built.wheel, "psycopg[binary]")
    consumer.install(application.source, f"{built.wheel}[worker]")
    server = EmbeddedPostgres(directory / "data", settings=SETTINGS)
    try:
        server.start()
        database = {"DATABASE_URL": server.url}
        done = consumer.command("outwake", "migrate", env=database)
        report.that("outwake migrate", done.returncode == 0, done.stderr)
        done = producer.code(_ENQUEUE, env=database)
        report.that("the core enqueues", done.returncode == 0, done.stderr)
        # Its processes are started in a folder that has a package `worker`, too.
        worker = consumer.start(
            "worker", "--processes", "2", "--topics", TOPIC, cwd=application.source, env=database
        )
        printed, status = _first_line_of(worker)
        report.same("what the application's handler printed", printed, "shop {'to': 'you'}")
        report.same("exit status of the worker after SIGTERM", status, 0)
        with psycopg.connect(server.url) as conn:
            row = conn.execute(
                "SELECT topic, state FROM outwake.outbox WHERE topic = %s", (TOPIC,)
            ).fetchone()
        report.same("the row", row, (TOPIC, "done"))
    finally:
        server.remove()


def _first_line_of(worker: subprocess.Popen[str]) -> tuple[str, int]:
    """What it prints, and its exit status after SIGTERM. A worker that hangs is killed."""
    timer = threading.Timer(_PATIENCE, worker.kill)
    timer.start()
    with worker:
        assert worker.stdout is not None
        line = worker.stdout.readline().strip()
        worker.send_signal(signal.SIGTERM)
        status = worker.wait()
    timer.cancel()
    return line, status
