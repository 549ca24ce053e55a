"""Builds the wheel and the source distribution, and looks into them."""

import hashlib
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from email.message import Message
from email.parser import Parser
from pathlib import Path

from tests.support.process import ROOT
from tests.wheel.report import Report


@dataclass(frozen=True)
class Built:
    """What was built."""

    wheel: Path
    context: Path
    """What the Dockerfile copies to build from."""


def build(directory: Path) -> Built:
    """Build from the work tree, and lay the image's context beside it."""
    (directory / "context").mkdir()
    for source, target in image_sources():
        _copy(ROOT / source, directory / "context" / target)
    _hatchling(ROOT, directory / "dist")
    (wheel,) = (directory / "dist").glob("*.whl")
    return Built(wheel, directory / "context")


def check(built: Built, report: Report) -> None:
    """What is in the wheel, and that it is the same wherever it is built from."""
    report.begin("the wheel")
    with zipfile.ZipFile(built.wheel) as archive:
        names = set(archive.namelist())
        metadata = Parser().parsestr(_text(archive, "METADATA"))
        entries = _text(archive, "entry_points.txt")
        licence = archive.read(next(name for name in names if name.endswith("/licenses/LICENSE")))
    tops = {name.partition("/")[0] for name in names}
    report.same("outwake is its one top-level name", tops - {_dist_info(names)}, {"outwake"})
    report.same("it has the root's folders whole", _missing(names), set())
    report.that("it has py.typed", "outwake/py.typed" in names)
    report.that("it has no tests and no benchmarks", not any(re.search(r"/(tests|bench)/", n) for n in names))
    report.same("its licence is the repository's", licence, (ROOT / "LICENSE").read_bytes())
    report.that("it has our commands", "outwake = outwake.__main__:main" in entries, entries)
    _check_metadata(metadata, report)
    _check_sources(built, report)


def _check_metadata(metadata: Message, report: Report) -> None:
    report.same("licence expression", metadata["License-Expression"], "Apache-2.0")
    report.same("licence file", metadata["License-File"], "LICENSE")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    report.same("version", metadata["Version"], project["version"])
    changelog = (ROOT / "CHANGELOG.md").read_text()
    report.that("the changelog has this version", f"\n## [{project['version']}]" in changelog)
    always = [one for one in metadata.get_all("Requires-Dist", []) if "extra ==" not in one]
    report.same("the core needs psycopg alone", [re.split(r"[<>=]", one)[0] for one in always], ["psycopg"])
    extras = set(metadata.get_all("Provides-Extra", []))
    wanted = {"cli", "worker", "api", "embedded", "relay", "otel", "all"}
    report.that("it has the extras", extras >= wanted, extras)


def _check_sources(built: Built, report: Report) -> None:
    """The same bytes, from the work tree, the source distribution and the image's context."""
    (sdist,) = built.wheel.parent.glob("*.tar.gz")
    unpacked = built.wheel.parent / "unpacked"
    with tarfile.open(sdist) as archive:
        tops = {name.partition("/")[0] for name in archive.getnames()}
        links = [member.name for member in archive if not member.isfile()]
        archive.extractall(unpacked, filter="data")
    report.same("the source distribution has one folder", len(tops), 1)
    report.same("the source distribution has files only", links, [])
    for name, source in (("source distribution", unpacked / tops.pop()), ("image", built.context)):
        target = built.wheel.parent / name
        _hatchling(source, target, "wheel")
        report.same(f"the wheel of the {name}", _digest(target / built.wheel.name), _digest(built.wheel))


def image_sources() -> list[tuple[str, str]]:
    """(source, target) of what the Dockerfile's first stage copies from the repository."""
    found = []
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            *sources, target = shlex.split(line)[1:]
            found += [(name, f"{target}/{name}" if target == "./" else target) for name in sources]
    return found


def _missing(names: set[str]) -> set[str]:
    """Files of the repository that should be in the wheel, and are not."""
    kept = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    linked = [path for path in (ROOT / "outwake").iterdir() if path.is_symlink()]
    folders = ("outwake/", *(f"{path.name}/" for path in linked))
    files = [name for name in kept.stdout.split() if name.startswith(folders) and (ROOT / name).is_file()]
    return {name if name.startswith("outwake/") else f"outwake/{name}" for name in files} - names


def _dist_info(names: set[str]) -> str:
    return next(name for name in names if name.endswith(".dist-info/RECORD")).partition("/")[0]


def _text(archive: zipfile.ZipFile, name: str) -> str:
    return archive.read(f"{_dist_info(set(archive.namelist()))}/{name}").decode()


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():  # links in it stay links, as with COPY
        shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copyfile(source, target)


def _hatchling(source: Path, target: Path, *only: str) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(target)]
    for kind in only:
        command += ["--target", kind]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"tests.wheel: cannot build from {source}\n{done.stdout}{done.stderr}")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "not built"


def image_extras() -> str:
    """The extras that the Dockerfile installs."""
    found = re.search(r"'\.\[([a-z,]+)\]'", (ROOT / "Dockerfile").read_text())
    return found[1] if found else ""
