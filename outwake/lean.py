"""A process that is lean: libraries without what they take along where they find it, but do not need, and a
garbage collector that looks seldom.
"""

import gc
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


def collect_seldom() -> None:
    """Once all that stays is there: it is never looked at again, and the rest 50,000 objects later."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
