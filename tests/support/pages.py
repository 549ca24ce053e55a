"""The code blocks of the pages, and the example that the pages show."""

import re
import tomllib
from pathlib import Path

from tests.support.process import ROOT

EXAMPLE = ROOT / "docs" / "examples" / "email_topic"


def blocks(page: str, language: str) -> list[str]:
    """The fenced code blocks of a page."""
    text = (ROOT / "docs" / page).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def install_example(example: Path, target: Path) -> None:
    """What pip would leave behind: the module, and the metadata that names its entry points."""
    project = tomllib.loads((example / "pyproject.toml").read_text())
    name = project["project"]["name"].replace("-", "_")
    (target / f"{name}.py").write_text((example / f"{name}.py").read_text())
    metadata = target / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = []
    for group, entries in project["project"]["entry-points"].items():
        lines += [f"[{group}]", *(f"{topic} = {value}" for topic, value in entries.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
