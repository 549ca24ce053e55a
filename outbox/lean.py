"""Imports a library without what it takes along where it finds it, but does not need."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Let imports in the block fail for these modules, unless they are loaded already."""
    absent = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None: as if not installed
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
