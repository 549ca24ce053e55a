"""What a worker is made of. The parts live as long as the worker; a link as long as its connections do."""

from collections import deque
from dataclasses import dataclass
from uuid import UUID

from outwake.handler import Connection, Handler
from outwake.settings import Settings
from outwake.telemetry.stuck import StuckWatch
from outwake.worker.engine.background import BackgroundScan
from outwake.worker.engine.backup import Backup
from outwake.worker.engine.claims import Claims
from outwake.worker.engine.cursor import Cursors
from outwake.worker.engine.lease import Lease
from outwake.worker.engine.listen import Listener
from outwake.worker.engine.metrics import Stats
from outwake.worker.engine.observer import WorkerObserver
from outwake.worker.engine.parking import Parking
from outwake.worker.engine.probe import Probe
from outwake.worker.engine.running import Running
from outwake.worker.engine.timers import Timers
from outwake.worker.engine.wakes import Wakes


@dataclass(frozen=True)
class Parts:
    """The parts that outlive a connection."""

    settings: Settings
    handlers: dict[str, Handler]
    topics: deque[str]
    """The topics of `handlers`. They take turns in a claim, so that none starves."""
    running: Running
    lease: Lease
    parking: Parking
    wakes: Wakes
    timers: Timers
    probe: Probe
    backup: Backup
    cursors: Cursors
    background: BackgroundScan
    stuck: StuckWatch
    stats: Stats
    observer: WorkerObserver


@dataclass(frozen=True)
class Link:
    """The worker's two connections, and the id under which it uses them."""

    worker_id: UUID
    control: Connection
    """In autocommit, for the worker's one task."""
    listener: Listener
    claims: Claims
