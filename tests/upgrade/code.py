"""The code of a version, built as the wheel it is and installed into a directory of its own.

Its dependencies come from the environment that runs the test. A process that is started with `environment`
finds this version first: its modules, its entry points and its version number. `verify` makes sure of that,
because the environment has an editable install of this tree as well.
"""

import json
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from tests.support.process import ROOT

SHOP = Path(__file__).with_name("shop")
RELEASED = Path(__file__).with_name("released")
"""The commit of the last release: one id."""

_PROBE = """
import json, outwake, sys
from importlib.metadata import entry_points, version
found = entry_points(group="outwake.handlers")
print(json.dumps([outwake.__file__, version("outwake"), sorted(entry.name for entry in found)]))
"""
_TOPICS = ["outbox.prune", "session.run", "shop.keyed", "shop.limited", "shop.plain", "shop.returned"]
"""Some of those that a worker of any version serves, each once."""


class CodeError(Exception):
    """The code cannot be had or installed."""


class NotInClone(CodeError):
    """The commit is in the repository, but not in this shallow clone."""


@dataclass(frozen=True)
class Code:
    """An installed version. `name` is for people; `version` is its number."""

    name: str
    version: str
    directory: Path
    shop: Path

    def __str__(self) -> str:
        return f"{self.name} ({self.version})"

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a process that runs this code."""
        # PYTHONSAFEPATH: the current directory has packages of the same names.
        return {"PYTHONPATH": f"{self.directory}:{self.shop}", "PYTHONSAFEPATH": "1"}

    def command(self, name: str) -> str:
        """The path of one of its commands."""
        return str(self.directory / "bin" / name)

    @property
    def agent(self) -> Path:
        """The scripted agent, a program of one file."""
        return self.directory / "outwake" / "embedded" / "agent.py"


def install_shop(directory: Path) -> Path:
    """Install the application of the test (shop/). Raises CodeError."""
    target = directory / "shop"
    _install(SHOP, target)
    return target


def install(name: str, tree: Path, directory: Path, shop: Path) -> Code:
    """Build the tree's wheel and install it. Raises CodeError."""
    target = directory / name
    _install(tree, target)
    (info,) = target.glob("outwake-*.dist-info")
    code = Code(name, info.name.removesuffix(".dist-info").partition("-")[2], target, shop)
    _verify(code)
    return code


def old_tree(given: str, directory: Path) -> Path:
    """The tree that `given` names: a directory, or a commit of this repository. Raises CodeError."""
    if Path(given).is_dir():
        return Path(given).absolute()
    if _git("cat-file", "-e", f"{given}^{{commit}}").returncode != 0:
        shallow = _git("rev-parse", "--is-shallow-repository").stdout.strip() == b"true"
        raise (NotInClone if shallow else CodeError)(f"commit {given} is not in this clone")
    done = _git("archive", "--format=tar", given)
    if done.returncode != 0:
        raise CodeError(f"git archive {given}: {done.stderr.decode().strip()}")
    archive, target = directory / "old.tar", directory / "old-tree"
    archive.write_bytes(done.stdout)
    with tarfile.open(archive) as packed:
        packed.extractall(target, filter="tar")  # "data" refuses links that leave a folder
    return target


def _git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=False)


def _install(tree: Path, target: Path) -> None:
    """Without an index: hatchling, which builds it, is in this environment."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command = [*pip, "--no-index", "--no-build-isolation", "--target", str(target), str(tree)]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CodeError(f"cannot install {tree}:\n{done.stdout}{done.stderr}")


def _verify(code: Code) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROBE],
        cwd=ROOT,
        env=code.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise CodeError(f"{code} cannot be imported:\n{done.stderr}")
    file, version, topics = json.loads(done.stdout)
    if not Path(file).is_relative_to(code.directory) or version != code.version:
        raise CodeError(f"a process of {code} runs {file} {version}")
    if len(topics) != len(set(topics)) or not set(_TOPICS) <= set(topics):
        raise CodeError(f"a process of {code} has handlers for {topics}")
