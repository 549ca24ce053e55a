"""The contract: what the library exports, and who may import whom."""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import outwake
from outwake import sql
from tests.support.process import ROOT

ROOMS = ("app", "worker", "sql", "embedded")  # folders of the root, linked below outwake/


def _room(name: str) -> str:
    """`outwake.worker.loop` is in the room `worker`, `outwake.claim` in `outwake`."""
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


def test_migrations_are_numbered_without_a_gap_and_once() -> None:
    numbers = [migration.number for migration in sql.migrations()]
    assert numbers == list(range(1, len(numbers) + 1))


def test_every_sql_file_is_a_migration() -> None:
    files = {path.stem for path in (ROOT / "sql").glob("*.sql")}
    assert files == {migration.name for migration in sql.migrations()}
