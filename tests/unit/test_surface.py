"""The contract: what the library exports, and who may import whom."""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import outwake
from outwake.sql import LINES, Line, files
from tests.support.process import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PSYCOPG = {"psycopg", "psycopg_binary", "psycopg_c", "typing_extensions", "cython_runtime", "backports"}
ROOMS = ("app", "worker", "sql", "embedded")  # folders of the root, linked below outwake/


def _room(name: str) -> str:
    """`outwake.worker.engine.worker` is in the room `worker`, `outwake._claim` in `outwake`."""
    top, _, rest = name.partition(".")
    below = rest.partition(".")[0]
    return below if top == "outwake" and below in ROOMS else top


def imports(package: str) -> dict[Path, set[str]]:
    """The rooms, and the packages of others, that each module of a folder imports, in functions too."""
    found: dict[Path, set[str]] = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {_room(alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names |= {_room(f"{node.module}.{alias.name}") for alias in node.names}
        found[path] = names
    assert found
    return found


@pytest.mark.parametrize(
    ("package", "never"),
    [
        ("app", {"worker", "embedded", "tests"}),
        ("worker", {"app", "embedded", "tests"}),
        ("outwake", {"app", "worker", "embedded", "tests"}),
        ("sql", {"app", "worker", "outwake", "embedded", "tests"}),
        ("embedded", {"tests"}),
    ],
)
def test_layers(package: str, never: set[str]) -> None:
    """app and worker never import each other; outwake itself imports neither."""
    wrong = {str(path): names & never for path, names in imports(package).items() if names & never}
    assert wrong == {}


CONCERNS = ("agents", "handlers", "messages", "process", "repo", "sandboxes", "secrets")


@pytest.mark.parametrize(
    ("files", "never"),
    [
        ("worker/engine/*.py", ("outwake.session", *(f"outwake.worker.{name}" for name in CONCERNS))),
        ("outwake/*.py", ("outwake.session",)),
        ("outwake/telemetry/*.py", ("outwake.session",)),
    ],
)
def test_the_queue_knows_nothing_of_sessions(files: str, never: tuple[str, ...]) -> None:
    """The engine runs any handler, the library serves any application. Settings hold those of all rooms."""
    wrong = {}
    paths = [path for path in sorted(ROOT.glob(files)) if path.name != "settings.py"]
    assert paths
    for path in paths:
        modules = {
            name
            for node in ast.walk(ast.parse(path.read_text()))
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [f"{node.module}.{alias.name}" for alias in node.names]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        if found := sorted(name for name in modules if f"{name}.".startswith(tuple(f"{n}." for n in never))):
            wrong[str(path)] = found
    assert wrong == {}


def test_exports_are_sorted_and_complete() -> None:
    """All public names that outwake/__init__.py binds, in order: capitals first, as sorted() has them."""
    assert outwake.__all__ == sorted(outwake.__all__)
    modules = {module.name for module in pkgutil.iter_modules(outwake.__path__)}
    bound = {
        name
        for name, value in vars(outwake).items()
        if not name.startswith("_") and not (inspect.ismodule(value) and name in modules)
    }
    assert bound == set(outwake.__all__)


@pytest.mark.parametrize("name", outwake.__all__)
def test_export_is_documented_and_ours(name: str) -> None:
    value = getattr(outwake, name)
    assert inspect.getdoc(value)
    assert value.__module__.startswith("outwake.")


def test_every_error_is_in_the_tree_and_exported() -> None:
    errors = importlib.import_module("outwake.errors")
    found = inspect.getmembers(errors, inspect.isclass)
    classes = {name for name, value in found if value.__module__ == errors.__name__}
    assert classes <= set(outwake.__all__)
    assert errors.__doc__ is not None
    assert all(name in errors.__doc__ for name in classes)


@pytest.mark.parametrize("line", LINES)
def test_numbered_files_are_numbered_without_a_gap_and_once(line: Line) -> None:
    numbers = [file.number for file in files(line) if file.number is not None]
    assert numbers == list(range(1, len(numbers) + 1))


def test_every_sql_file_is_applied() -> None:
    there = {str(path.relative_to(ROOT / "sql")) for path in (ROOT / "sql").rglob("*.sql")}
    names = {
        file.name.replace("/", "/" if file.number else "/functions/")
        for line in LINES
        for file in files(line)
    }
    assert there == {f"{name}.sql" for name in names}


def test_the_library_needs_psycopg_alone() -> None:
    """What `import outwake` loads of others: so an application that enqueues installs no more."""
    code = "import sys, outwake, outwake._enqueue; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    others = set(done.stdout.split()) - sys.stdlib_module_names - {"outwake"}
    assert {name for name in others if not name.startswith("_")} <= PSYCOPG


def test_the_editable_path_has_the_package_alone() -> None:
    """Else the user's own packages app and worker would be shadowed by the root's folders."""
    (folder,) = PROJECT["tool"]["hatch"]["build"]["dev-mode-dirs"]
    assert [path.name for path in (ROOT / folder).iterdir()] == ["outwake"]
    assert (ROOT / folder / "outwake").resolve() == ROOT / "outwake"


def test_the_rooms_are_links_to_the_folders_at_the_root() -> None:
    links = [path for path in (ROOT / "outwake").iterdir() if path.is_symlink()]
    assert {path.name: path.resolve() for path in links} == {name: ROOT / name for name in ROOMS}


CLOCKS = {
    "app/auth/identity.py": "a token's exp, by the issuer's clock",
    "worker/handlers/webhook.py": "the signature's time, for the receiver",
    "outwake/cli/status.py": "when the command looked, for its reader",
    "app/dashboard/formatting.py": "how long ago, for a reader",
}
"""Who reads this host's clock, and for what."""


def test_no_clock_of_a_host_meets_a_time_of_the_database() -> None:
    """The database's clock decides: a worker's may be hours behind. The monotonic clock is for durations."""
    read = {
        str(path.relative_to(ROOT))
        for room in ("app", "worker", "outwake")
        for path in (ROOT / room).rglob("*.py")
        if re.search(r"datetime\.now|\btime\.time\(|utcnow|date\.today", path.read_text())
    }
    assert read == set(CLOCKS)
