"""What notifications mean.

Channel wake, payload TARGET@DUE, TARGET@0#ID or TARGET@0#ID,PRESENCE,N (sql/outbox/functions/wake.sql):
TARGET is a topic, `*` for all workers, or `#` and a worker's id. DUE is in milliseconds of the server's
clock; 0 is now. A later DUE is when a row falls due, or for `*` when a lease ends. ID names the single row to
claim. PRESENCE names the worker that is to claim it, of N that sleep.

Channel cancel, payload ID: the row is to be stopped. Channel probe: worker/engine/probe.py.

A newer version may send more, and anybody may NOTIFY anything. So what is not understood means: scan, or ask
which rows are to be stopped.
"""

import re
import time
from collections.abc import Callable, Container

from outwake.telemetry.log import get_logger
from outwake.worker.engine.backup import Backup
from outwake.worker.engine.listen import CANCEL, PROBE, WAKE
from outwake.worker.engine.parking import Parking, Stage
from outwake.worker.engine.probe import Probe
from outwake.worker.engine.running import Running
from outwake.worker.engine.timers import Timers
from outwake.worker.engine.wakes import Reason, Wakes

log = get_logger(__name__)

_OF_OTHERS = re.compile(r"[a-z][a-z0-9_.-]*|#[0-9a-f-]{36}")
"""The target of a notification that is not for this worker: a topic, or a worker."""


class Inbox:
    """Hears for the worker of this presence. `announced` is called with the id of a single row to claim."""

    def __init__(
        self,
        presence: int,
        topics: Container[str],
        running: Running,
        parking: Parking,
        wakes: Wakes,
        timers: Timers,
        probe: Probe,
        backup: Backup,
        announced: Callable[[int], None],
    ) -> None:
        self.presence = presence
        self._topics = topics
        self._running = running
        self._parking = parking
        self._wakes = wakes
        self._timers = timers
        self._probe = probe
        self._backup = backup
        self._announced = announced
        self._puzzling: set[str] = set()
        """Channels on which a notification was not understood."""

    def heard(self, channel: str, payload: str) -> None:
        """Act on a notification. This is called between two steps of the worker's task, at any moment."""
        try:
            if channel == WAKE:
                self._wake(payload)
            elif channel == CANCEL:
                self._cancel(int(payload))
            elif channel == PROBE:
                self._probe.heard(payload)
        except (ValueError, OverflowError):  # nothing has been done
            self._not_understood(channel, payload)

    def _wake(self, payload: str) -> None:
        target, _, due = payload.rpartition("@")
        if target not in self._topics and target not in ("*", f"#{self._running.worker_id}"):
            if not _OF_OTHERS.fullmatch(target):
                raise ValueError(payload)
            return
        due, _, single = due.partition("#")
        if due != "0":  # due later: set a deadline, without a query
            self._due_later(target, int(due) / 1000)
        elif single:
            self._single(*_single(single))
        elif target.startswith("#"):
            self._scan(Reason.UNPARKED)
        else:
            self._scan(Reason.CALLED if target == "*" else Reason.NOTIFIED)

    def _due_later(self, target: str, due: float) -> None:
        """A row of the topic falls due then, or (`*`) a lease ends."""
        timers = self._timers
        if timers.announced_lease(due, self._backup.jitter()) if target == "*" else timers.announced_row(due):
            self._wakes.event.set()

    def _scan(self, reason: Reason) -> None:
        self._wakes.count("notify")
        self._wakes.wake(reason)

    def _single(self, row_id: int, named: int | None, asleep: int) -> None:
        """A single row is for the worker of that presence among `asleep`, or for any (None)."""
        if named is None or named == self.presence:
            self._announced(row_id)
            self._wakes.count("notify")
            self._wakes.event.set()
        elif self._parking.stage is not Stage.AWAKE and self._backup.heard(row_id, asleep, time.monotonic()):
            self._wakes.event.set()  # for the deadline

    def _cancel(self, row_id: int) -> None:
        # Any role may NOTIFY anything. So a renewal asks the table, before a handler is stopped.
        if row_id in self._running.attempts:
            self._renew()

    def _not_understood(self, channel: str, payload: str) -> None:
        if channel not in self._puzzling:
            self._puzzling.add(channel)
            log.info("not_understood", channel=channel, payload=payload[:200])
        if channel == WAKE:
            self._scan(Reason.NOTIFIED)
        elif channel == CANCEL:
            self._renew()

    def _renew(self) -> None:
        self._wakes.renewal = True
        self._wakes.event.set()


def _single(text: str) -> tuple[int, int | None, int]:
    """Parse ID or ID,PRESENCE,N: a row, the worker that is to claim it, and the number of parked workers.
    Raises ValueError.
    """
    match [int(number) for number in text.split(",")]:
        case [row_id] if 0 <= row_id < 2**63:
            return row_id, None, 1
        case [row_id, named, asleep] if 0 <= row_id < 2**63 and 0 <= named < 2**31 and 0 < asleep < 2**31:
            return row_id, named, asleep
    raise ValueError(text)
