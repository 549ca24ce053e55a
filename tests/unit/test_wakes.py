"""Why a worker scans: what a scan does away with, and what stays for the next cycle."""

import pytest

from outwake.worker.engine.metrics import STATS
from outwake.worker.engine.parking import Parking
from outwake.worker.engine.wakes import Reason, Wakes


@pytest.mark.parametrize("reason", [Reason.CALLED, Reason.UNPARKED])
def test_what_asks_for_more_than_a_scan_outlives_a_scan(reason: Reason) -> None:
    """It may come in the middle of a cycle, before the scan. A worker did not notice a migration."""
    wakes = Wakes(Parking(), STATS)
    wakes.wake(reason)
    assert wakes.take()
    assert wakes.reasons == {reason}


def test_a_scan_takes_all_other_reasons() -> None:
    wakes = Wakes(Parking(), STATS)
    for reason in set(Reason) - {Reason.CALLED, Reason.UNPARKED}:
        wakes.wake(reason)
    assert wakes.take()
    assert wakes.reasons == set()
