"""The Postgres server of a test run: DATABASE_URL, or Docker's, or the embedded one."""

import os
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
        from embedded.postgres import EmbeddedPostgres

        server = EmbeddedPostgres(data_dir, settings=SETTINGS)
        try:
            server.start()
            yield server.url
        finally:
            server.remove()


def docker_answers() -> bool:
    import docker
    from docker.errors import DockerException

    try:
        client = docker.from_env(timeout=2)
    except DockerException:  # there is no engine
        return False
    try:
        return bool(client.ping())
    except (DockerException, OSError):
        return False
    finally:
        client.close()


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
