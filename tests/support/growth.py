"""How the work on a text grows with the text. Work is counted in CPU time of this thread."""

import gc
import time
from collections.abc import Callable

SMALLEST, LARGEST = 1024, 1 << 20
_DOUBLINGS = 3  # one doubling alone depends too much on caches and on other work of the machine
_RATIO = 3.5**_DOUBLINGS
_FLOOR = 0.002  # seconds of CPU below which a ratio is noise
_HOPELESS = 5.0


def assert_linear(work: Callable[[str], object], pattern: str, largest: int = LARGEST) -> None:
    """Fail if twice the text costs more than three and a half times the work, over three doublings.

    pattern: repeated to make the text.
    """
    costs: list[float] = []
    size = SMALLEST
    while size <= largest:
        costs.append(_cpu(work, (pattern * (size // len(pattern) + 1))[:size]))
        assert costs[-1] < _HOPELESS, f"{size} characters of {pattern!r} cost {costs[-1]:.1f} s"
        if len(costs) > _DOUBLINGS:
            ratio = costs[-1] / max(costs[-1 - _DOUBLINGS], _FLOOR)
            times = 2**_DOUBLINGS
            assert ratio <= _RATIO, f"{pattern!r}: {times} times the text cost {ratio:.0f} times as much"
        size *= 2


def _cpu(work: Callable[[str], object], text: str) -> float:
    """The least of three, because other work on the machine only adds to it."""
    times: list[float] = []
    enabled = gc.isenabled()
    gc.disable()
    try:
        while len(times) < 3 and sum(times) < 1:
            began = time.thread_time()
            work(text)
            times.append(time.thread_time() - began)
    finally:
        if enabled:
            gc.enable()
    return min(times)
