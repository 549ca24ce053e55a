"""A reader can hold each part in mind: modules, classes and functions have a size that they keep."""

import ast
from collections.abc import Iterator

from tests.support.process import ROOT

MODULE, FUNCTION, ATTRIBUTES = 400, 50, 15
"""Lines of a module, lines of a function without its docstring (a screen), attributes that a class sets."""


def _sources() -> Iterator[tuple[str, str]]:
    for room in ("outwake", "app", "worker", "sql", "embedded"):
        for path in sorted((ROOT / room).rglob("*.py")):
            yield str(path.relative_to(ROOT)), path.read_text()


def _nodes(*kinds: type[ast.AST]) -> Iterator[tuple[str, ast.AST]]:
    for name, text in _sources():
        yield from ((name, node) for node in ast.walk(ast.parse(text)) if isinstance(node, kinds))


def _own_attributes(node: ast.ClassDef) -> set[str]:
    return {
        part.attr
        for part in ast.walk(node)
        if isinstance(part, ast.Attribute)
        and isinstance(part.ctx, ast.Store)
        and isinstance(part.value, ast.Name)
        and part.value.id == "self"
    }


def test_a_module_has_one_idea() -> None:
    long = {name: lines for name, text in _sources() if (lines := len(text.splitlines())) > MODULE}
    assert long == {}


def test_a_function_fits_a_screen() -> None:
    long = {}
    for name, node in _nodes(ast.FunctionDef, ast.AsyncFunctionDef):
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        doc = node.body[0] if ast.get_docstring(node) is not None else None
        said = 0 if doc is None else (doc.end_lineno or doc.lineno) - doc.lineno + 1
        lines = (node.end_lineno or node.lineno) - node.lineno + 1 - said
        if lines > FUNCTION:
            long[f"{name}::{node.name}"] = lines
    assert long == {}


def test_a_class_has_few_attributes() -> None:
    wide = {}
    for name, node in _nodes(ast.ClassDef):
        assert isinstance(node, ast.ClassDef)
        if len(found := _own_attributes(node)) > ATTRIBUTES:
            wide[f"{name}::{node.name}"] = sorted(found)
    assert wide == {}
