"""Reduce memory and CPU time: import libraries without optional dependencies, collect garbage rarely."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Make imports of these modules fail inside the block, unless the modules are already loaded.

    It keeps an idle worker below 60 MB (docs/profile.md).
    """
    absent = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None: as if not installed
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def collect_seldom() -> None:
    """Call this once, when all long-lived objects exist: they are never scanned again, and others rarely."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
