"""How the work on a text grows with the text. Work is counted in CPU time of this thread.

What the system takes to hand out memory does not count for the longer text: hundreds of thousands of objects
need new pages, and few need none, so it grows in steps that tell nothing of the work.
"""

import gc
import resource
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
        cost, worked = _cpu(work, (pattern * (size // len(pattern) + 1))[:size])
        costs.append(cost)
        assert cost < _HOPELESS, f"{size} characters of {pattern!r} cost {cost:.1f} s"
        if len(costs) > _DOUBLINGS:
            ratio = worked / max(costs[-1 - _DOUBLINGS], _FLOOR)
            times = 2**_DOUBLINGS
            assert ratio <= _RATIO, f"{pattern!r}: {times} times the text cost {ratio:.0f} times as much"
        size *= 2


def _cpu(work: Callable[[str], object], text: str) -> tuple[float, float]:
    """Seconds, and those of them outside of the system. The least of three each, because other work on the
    machine only adds to it.
    """
    times: list[float] = []
    outside: list[float] = []
    enabled = gc.isenabled()
    gc.disable()
    try:
        while len(times) < 3 and sum(times) < 1:
            began, system = time.thread_time(), _system()
            work(text)
            times.append(time.thread_time() - began)
            outside.append(max(0.0, times[-1] - (_system() - system)))
    finally:
        if enabled:
            gc.enable()
    return min(times), min(outside)


def _system() -> float:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_stime
