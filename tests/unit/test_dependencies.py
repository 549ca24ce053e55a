"""docs/dependencies.md gives a reason for every package, and for no other."""

import re
import tomllib

from tests.support.process import ROOT


def name_of(requirement: str) -> str:
    return re.split(r"[\[<>=;! ]", requirement)[0].lower()


def test_every_dependency_has_a_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {name_of(requirement) for group in groups for requirement in group}
    text = (ROOT / "docs" / "dependencies.md").read_text()
    cells = re.findall(r"^\| ([^|]+) \| [^|]+ \| [^|]+ \|$", text, re.MULTILINE)
    explained = {name_of(name) for cell in cells for name in cell.split(", ")} - {"package"}
    assert explained == declared
