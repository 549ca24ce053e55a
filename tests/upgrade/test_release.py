"""The parts of the upgrade test that need no second version."""

import tomllib
from pathlib import Path

import pytest

from outwake.sql import LINES, newest
from tests.support.process import ROOT
from tests.upgrade.release import breaking_release, next_release, numbers, this_release


def version(tree: Path) -> str:
    return str(tomllib.loads((tree / "pyproject.toml").read_text())["project"]["version"])


@pytest.mark.parametrize(("old", "expected"), [("0.9.7", None), ("7.10.3", "7.10.4")])
def test_made_up_releases_follow_each_other(old: str, expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(f'[project]\nversion = "{old}"\n')
    this = this_release(tmp_path / "this", tmp_path)
    following, breaking = next_release(tmp_path / "next", this), breaking_release(tmp_path / "major", this)
    assert version(this) == (expected or version(ROOT))
    assert numbers(version(following)) > numbers(version(this))
    assert version(breaking) == f"{numbers(version(this))[0] + 1}.0.0"
    for line in LINES:
        [added] = (following / "sql" / line).glob(f"{newest(line) + 1:04}_*.sql")
        assert "goes on" in added.read_text()
        assert not (this / "sql" / line / added.name).exists()
    assert "must stop" in (breaking / "sql" / "outbox" / f"{newest('outbox') + 1:04}_next.sql").read_text()
