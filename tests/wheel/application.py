"""An application whose packages have the names of the folders at Outwake's root, and a handler."""

import hashlib
import json
from pathlib import Path

from tests.wheel.environment import Environment

PACKAGES = ("app", "embedded", "outbox", "sql", "tests", "worker")
TOPIC = "shop.mail"

_PYPROJECT = f"""\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "shop"
version = "1"

[project.entry-points."outwake.handlers"]
"{TOPIC}" = "app.handlers:handler"

[tool.hatch.build.targets.wheel]
packages = {json.dumps(PACKAGES)}
"""

_HANDLERS = f"""\
from outwake import Handler, Job

from app import OWNER


async def send(job: Job) -> None:
    print(OWNER, job.payload, flush=True)


handler = Handler("{TOPIC}", send)
"""

_PROBE = """
import importlib, json, sys
modules = [importlib.import_module(name) for name in sys.argv[1:]]
print(json.dumps([[module.__name__, module.OWNER, module.__file__] for module in modules]))
"""

_MODULES = [*PACKAGES, "app.main", "worker.__main__", "worker.cli"]


class Application:
    """Its source, and what an environment has of it."""

    def __init__(self, directory: Path) -> None:
        self.source = directory
        directory.mkdir()
        (directory / "pyproject.toml").write_text(_PYPROJECT)
        for package in PACKAGES:
            (directory / package).mkdir()
            (directory / package / "__init__.py").write_text("OWNER = 'shop'\n")
        for module in ("app/main.py", "worker/__main__.py", "worker/cli.py"):
            (directory / module).write_text("OWNER = 'shop'\n")
        (directory / "app" / "handlers.py").write_text(_HANDLERS)

    def owners(self, environment: Environment) -> set[str]:
        """Who its modules belong to, imported in that environment; else what went wrong."""
        done = environment.command("python", "-P", "-c", _PROBE, *_MODULES)
        if done.returncode != 0:
            return {done.stderr}
        return {owner for _, owner, _ in json.loads(done.stdout)}

    def files(self, environment: Environment) -> dict[str, str]:
        """Its source, and what site-packages has of it, each file with a digest."""
        files = [*self.source.rglob("*.py"), *environment.site.glob("*shop*.pth")]
        files += environment.site.glob("shop-1.dist-info/*")
        files += [path for name in PACKAGES for path in environment.site.glob(f"{name}/**/*.py")]
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
