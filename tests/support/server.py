"""The Postgres server of a test run: DATABASE_URL, or Docker's, or the embedded one."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

# Nothing here must survive a crash. Tests that need durability run a server of their own.
SETTINGS: dict[str, str | int] = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "max_connections": 300,
    "max_prepared_transactions": 10,
    "shared_preload_libraries": "pg_stat_statements",
}
DOCKER_IMAGE = "postgres:18"


@contextmanager
def running_server(data_dir: Path) -> Iterator[str]:
    """Yield the URL of a superuser's database on a server for this run.

    1. DATABASE_URL, if it is set: its role must be able to create databases.
    2. A container, where a Docker engine answers (the `docker` command alone proves nothing).
    3. The embedded server, in `data_dir`.
    """
    if url := os.environ.get("DATABASE_URL"):
        yield url
    elif docker_answers():
        with _container() as url:
            yield url
    else:
        from outwake.embedded.postgres import EmbeddedPostgres

        server = EmbeddedPostgres(data_dir, settings=SETTINGS)
        try:
            server.start()
            yield server.url
        finally:
            server.remove()


def docker_answers() -> bool:
    """Ask the engine itself. A DOCKER_HOST elsewhere is an explicit wish: let its failure show.

    By a plain socket: neither Docker's client nor httpx closes one that could not connect.
    """
    host = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    if not host.startswith("unix://"):
        return True
    with socket.socket(socket.AF_UNIX) as engine:
        engine.settimeout(2)
        try:
            engine.connect(host.removeprefix("unix://"))
            engine.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
            return b" 200 " in engine.recv(64)
        except OSError:
            return False


@contextmanager
def _container() -> Iterator[str]:
    from testcontainers.postgres import PostgresContainer

    options = " ".join(f"-c {name}={value}" for name, value in SETTINGS.items())
    container = PostgresContainer(DOCKER_IMAGE, driver=None).with_command(f"postgres {options}")
    with container:
        yield container.get_connection_url()


def with_database(url: str, name: str) -> str:
    """The same URL, another database."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))
