"""docs/dependencies.md gives a reason for every package, and for no other; constraints.txt pins each."""

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.process import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GROUPS = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
DECLARED = [Requirement(text) for group in GROUPS.values() for text in group]
OTHERS = [one for one in DECLARED if one.name != "outwake"]
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
)


def test_every_dependency_has_a_reason() -> None:
    text = (ROOT / "docs" / "dependencies.md").read_text()
    cells = re.findall(r"^\| ([^|]+) \| [^|]+ \| [^|]+ \|$", text, re.MULTILINE)
    explained = {Requirement(name).name.lower() for cell in cells for name in cell.split(", ")} - {"package"}
    assert explained == {one.name.lower() for one in OTHERS}


@pytest.mark.parametrize("requirement", OTHERS, ids=str)
def test_every_dependency_is_pinned_for_developers(requirement: Requirement) -> None:
    """`make constraints` writes the file anew."""
    assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)])


def test_the_constraints_name_releases_and_no_place() -> None:
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in PINS)
    assert all(re.fullmatch(r"[0-9a-z.]+", version) for version in PINS.values())


def test_one_range_for_each_package() -> None:
    """A package stands in several extras, always with the same range."""
    ranges = {(one.name, str(one.specifier), str(one.marker)) for one in OTHERS}
    assert len(ranges) == len({one.name for one in OTHERS})


def test_the_library_brings_no_libpq_and_the_commands_do() -> None:
    """psycopg's advice: a library leaves that choice to the application."""
    assert [str(Requirement(text)) for text in GROUPS[""]] == ["psycopg>=3.2.10"]
    assert Requirement(GROUPS["cli"][0]).extras == {"binary"}
    assert all("outwake[cli]" in GROUPS[name] for name in ("worker", "api"))


def test_all_names_every_extra_for_users() -> None:
    (everything,) = GROUPS["all"]
    assert Requirement(everything).extras == GROUPS.keys() - {"", "all", "cli", "test", "bench"}
