"""What happened, told by those who did it, outside the database: JSON lines in one file.

Handlers, producers and the faults append to it, each line by one write to a file opened with O_APPEND.
`t` is CLOCK_MONOTONIC, which all processes of a machine share and which goes on while one is stopped; `w`
is the wall clock, which the server reads too.

    start     an attempt begins: id, attempt, worker, pid, place, topic, key
    finish    its work is over, and what it did is about to be committed: id, attempt, how
    enqueue   a producer's transaction: tag, ids, outcome (acked, rolled_back, unknown), by
    died      the runner killed a process: pid
    fault     kind, target, begin and end as t
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class History:
    """The file, for appending."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def tell(self, event: str, **fields: Any) -> None:
        """Append a line. It is whole or, if this process is killed before the write, not there."""
        line = {"e": event, "t": time.monotonic(), "w": time.time(), **fields}
        os.write(self._file, json.dumps(line).encode() + b"\n")


def read(path: Path) -> Iterator[Line]:
    """The lines in the order in which they were written."""
    with path.open() as file:
        for line in file:
            yield json.loads(line)
