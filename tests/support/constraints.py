"""`make constraints`: writes constraints.txt, the releases that CI and the Makefile install.

It holds the newest set that fits pyproject.toml with every extra, as pip resolves it for this Python.
"""

import json
import re
import subprocess
import sys
from typing import Any

from tests.support.process import ROOT

FILE = ROOT / "constraints.txt"

HEAD = """\
# The releases that CI and the Makefile install, by `pip install -c`. They bind nobody who installs Outwake.
# Written by `make constraints`: the newest that fit pyproject.toml with every extra, for Python {python}.
"""


def main() -> None:
    """Resolve, without installing anything, and write the file."""
    report = _resolved()
    pins = sorted(_pin(one["metadata"]) for one in report["install"] if not one.get("requested"))
    python = report["environment"]["python_version"]
    FILE.write_text(HEAD.format(python=python) + "".join(f"{pin}\n" for pin in pins))


def _resolved() -> dict[str, Any]:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    command += ["--report", "-", ".[all,test,bench]"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def _pin(metadata: dict[str, str]) -> str:
    name = re.sub(r"[-_.]+", "-", metadata["name"]).lower()
    return f"{name}=={metadata['version']}"


if __name__ == "__main__":
    main()
