"""Releases that are made up from this tree.

This tree is taken for a release after the old one. Until its version is raised it has the same number, and
code takes changed functions of its own number for a developer's, which it replaces.

The next release has one more numbered migration in each line, which adds columns to every table and an index.
A function says more in its notifications than older code understands, and a comment differs. The breaking
release has a migration beside which older code must stop.
"""

import re
import shutil
import tomllib
from pathlib import Path

from outwake.sql import LINES, Line, files, newest
from tests.support.process import ROOT

_COPIED = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "outwake")
_TABLE = re.compile(r"^CREATE (?:UNLOGGED )?TABLE (\w+)", re.MULTILINE)
_SAYS_MORE = [
    ("|| ',' || sleepers;", "|| ',' || sleepers || ',next';"),
    ("coalesce(named, '')", "coalesce(named, ',next')"),
]
"""Of outbox_notify in sql/outbox/functions/wake.sql: what the next release has in its place."""


def this_release(target: Path, old: Path) -> Path:
    """This tree, as a release after that of the tree `old`."""
    _copy(target, max(_version(ROOT), _following(_version(old)), key=numbers))
    return target


def next_release(target: Path, this: Path) -> Path:
    """This tree as the next patch release. Older code goes on beside its schema."""
    _copy(target, _following(_version(this)))
    for line in LINES:
        _add_migration(target, line, "goes on", _columns(line))
    wake = target / "sql" / "outbox" / "functions" / "wake.sql"
    text = wake.read_text()
    for now, then in _SAYS_MORE:
        if text.count(now) != 1:
            raise AssertionError(
                f"{wake.name} has no longer {now!r}: change tests/upgrade/release.py with it"
            )
        text = text.replace(now, then)
    wake.write_text(
        f"{text}\nCOMMENT ON FUNCTION outbox_wake() IS 'Wakes every worker. Of the next release.';\n"
    )
    return target


def breaking_release(target: Path, this: Path) -> Path:
    """This tree as the next major release, beside whose schema older code must stop."""
    _copy(target, f"{numbers(_version(this))[0] + 1}.0.0")
    _add_migration(target, "outbox", "must stop", "ALTER TABLE outbox ADD COLUMN next_major boolean;\n")
    return target


def numbers(version: str) -> tuple[int, ...]:
    """Of a version, for comparing."""
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _version(tree: Path) -> str:
    return str(tomllib.loads((tree / "pyproject.toml").read_text())["project"]["version"])


def _following(version: str) -> str:
    """The next patch release."""
    first = numbers(version)
    return ".".join(map(str, (*first[:-1], first[-1] + 1)))


def _copy(target: Path, version: str) -> None:
    target.mkdir()
    linked = [path.resolve().name for path in (ROOT / "outwake").iterdir() if path.is_symlink()]
    for name in (*_COPIED, *linked):
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=ignored)
        else:
            shutil.copyfile(ROOT / name, target / name)
    project = target / "pyproject.toml"
    text, count = re.subn(
        r'^version = ".*"$', f'version = "{version}"', project.read_text(), flags=re.MULTILINE
    )
    assert count == 1
    project.write_text(text)


def _add_migration(target: Path, line: Line, older: str, text: str) -> None:
    path = target / "sql" / line / f"{newest(line) + 1:04}_next.sql"
    path.write_text(f"-- code of the version before: {older}\n\n{text}")


def _columns(line: Line) -> str:
    tables = [name for file in files(line) if file.number for name in _TABLE.findall(file.text)]
    assert tables
    statements = [
        f"ALTER TABLE {table} ADD next_text text NOT NULL DEFAULT 'next', ADD next_number integer;"
        for table in tables
    ]
    return "\n".join([*statements, f"CREATE INDEX {line}_next ON {tables[0]} (next_number);", ""])
