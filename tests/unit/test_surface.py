"""The contract: what the library exports, and who may import whom."""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import outbox
import sql
from tests.support.process import ROOT


def imports(package: str) -> dict[Path, set[str]]:
    """The top-level packages that each module of a package imports, inside functions too."""
    found: dict[Path, set[str]] = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
        found[path] = names
    assert found
    return found


@pytest.mark.parametrize(
    ("package", "never"),
    [
        ("app", {"worker", "embedded", "tests"}),
        ("worker", {"app", "embedded", "tests"}),
        ("outbox", {"app", "worker", "embedded", "tests"}),
        ("sql", {"app", "worker", "outbox", "embedded", "tests"}),
        ("embedded", {"tests"}),
    ],
)
def test_layers(package: str, never: set[str]) -> None:
    """app and worker never import each other; outbox imports neither."""
    wrong = {str(path): names & never for path, names in imports(package).items() if names & never}
    assert wrong == {}


def test_exports_are_sorted_and_complete() -> None:
    """All public names that outbox/__init__.py binds, in order: capitals first, as sorted() has them."""
    assert outbox.__all__ == sorted(outbox.__all__)
    modules = {module.name for module in pkgutil.iter_modules(outbox.__path__)}
    bound = {
        name
        for name, value in vars(outbox).items()
        if not name.startswith("_") and not (inspect.ismodule(value) and name in modules)
    }
    assert bound == set(outbox.__all__)


@pytest.mark.parametrize("name", outbox.__all__)
def test_export_is_documented_and_ours(name: str) -> None:
    value = getattr(outbox, name)
    assert inspect.getdoc(value)
    assert value.__module__.startswith("outbox.")


def test_every_error_is_in_the_tree_and_exported() -> None:
    errors = importlib.import_module("outbox.errors")
    found = inspect.getmembers(errors, inspect.isclass)
    classes = {name for name, value in found if value.__module__ == errors.__name__}
    assert classes <= set(outbox.__all__)
    assert errors.__doc__ is not None
    assert all(name in errors.__doc__ for name in classes)


def test_migrations_are_numbered_without_a_gap_and_once() -> None:
    numbers = [migration.number for migration in sql.migrations()]
    assert numbers == list(range(1, len(numbers) + 1))


def test_every_sql_file_is_a_migration() -> None:
    files = {path.stem for path in (ROOT / "sql").glob("*.sql")}
    assert files == {migration.name for migration in sql.migrations()}
