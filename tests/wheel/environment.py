"""A virtual environment of its own, and the wheels of others that are installed into it."""

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from pathlib import Path

from tests.support.process import ROOT

HOUSE = ROOT / ".state" / "wheelhouse"

EXTRAS = "worker,api,otel,relay"
"""All but `embedded`, whose server is large. `make demo` tries that one."""

_BUILD = ["hatchling", "editables"]  # what building needs, also an editable install

_APPLICATIONS = ["alembic", "asyncpg", "django", "fastapi", "psycopg2-binary", "sqlalchemy[asyncio]"]
"""What the applications of `make adopt-test` have."""

Done = subprocess.CompletedProcess[str]


def fill_house() -> None:
    """Fetch the wheels of others, unless the ones for these requirements are there."""
    sources = [ROOT / "pyproject.toml", ROOT / "constraints.txt"]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    stamp = HOUSE / f"{key}-{sys.version_info.major}.{sys.version_info.minor}"
    if stamp.exists():
        return
    shutil.rmtree(HOUSE, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--constraint", "constraints.txt"]
    _checked(
        [*command, "--wheel-dir", str(HOUSE), f".[{EXTRAS}]", *_BUILD, *_APPLICATIONS], ROOT, dict(os.environ)
    )
    for ours in HOUSE.glob("outwake-*"):
        ours.unlink()
    stamp.touch()


class Environment:
    """Made empty, without pip: this process's pip installs into it, from the wheelhouse alone."""

    def __init__(self, directory: Path) -> None:
        venv.create(directory, symlinks=True, with_pip=False)
        self._bin = directory / "bin"
        self._elsewhere = directory / "elsewhere"
        self._elsewhere.mkdir()
        self.python = self._bin / "python"
        (self.site,) = directory.glob("lib/python*/site-packages")

    def install(self, *requirements: str | Path) -> None:
        """Install these, and what they need."""
        self._pip("install", "--no-compile", "--no-index", "--find-links", HOUSE, *requirements)

    def uninstall(self, name: str) -> None:
        """Remove a distribution, but nothing that it needed."""
        self._pip("uninstall", "--yes", name)

    def _pip(self, command: str, *arguments: str | Path) -> None:
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), command, "--quiet"]
        _checked([*pip, *map(str, arguments)], self._elsewhere, clean_environment({}))

    def distributions(self) -> set[str]:
        """The names of what is installed."""
        names = (path.name.partition("-")[0] for path in self.site.glob("*.dist-info"))
        return {name.lower() for name in names}

    def changed(self, name: str) -> list[str]:
        """Files of a distribution that are not as they were installed."""
        (record,) = self.site.glob(f"{name}-*.dist-info/RECORD")
        entries = [line.rsplit(",", 2) for line in record.read_text().splitlines()]
        return [path for path, digest, _ in entries if digest and digest != _digest(self.site / path)]

    def command(
        self, name: str, *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> Done:
        """Run a command of this environment, by default in a folder that has nothing to do with it."""
        command = [str(self._bin / name), *arguments]
        return _run(command, cwd or self._elsewhere, clean_environment(env or {}))

    def start(self, name: str, *arguments: str, cwd: Path, env: Mapping[str, str]) -> subprocess.Popen[str]:
        """Start a command of this environment, and do not wait for it. Its log is thrown away."""
        command = [str(self._bin / name), *arguments]
        return subprocess.Popen(
            command,
            cwd=cwd,
            env=clean_environment(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def code(self, text: str, env: Mapping[str, str] | None = None) -> Done:
        """Run a Python program, without the current directory on its path."""
        return self.command("python", "-P", "-c", text, env=env)


def _digest(path: Path) -> str:
    """As a RECORD has it."""
    found = hashlib.sha256(path.read_bytes()).digest() if path.exists() else b""
    return "sha256=" + urlsafe_b64encode(found).rstrip(b"=").decode()


def clean_environment(changes: Mapping[str, str]) -> dict[str, str]:
    """This process's variables without what tells Python, pip or Outwake anything."""
    ours = ("PIP_", "PYTHON", "OUTWAKE_", "PSYCOPG_", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    # No check gets as far as connecting.
    fixed = {"PIP_CONFIG_FILE": os.devnull, "DATABASE_URL": "postgresql://127.0.0.1:1/none"}
    return {**kept, **fixed, **changes}


def _run(command: list[str], cwd: Path, env: dict[str, str]) -> Done:
    return subprocess.run(
        command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )


def _checked(command: list[str], cwd: Path, env: dict[str, str]) -> None:
    done = _run(command, cwd, env)
    if done.returncode != 0:
        sys.exit(f"tests.wheel: {' '.join(command)}\n{done.stdout}{done.stderr}")
