"""All errors, as one tree.

    OutwakeError
    ├── ConfigurationError   a setting is missing or wrong: correct it, then start again
    ├── SchemaError          the database's schema is older or newer than this code
    ├── Duplicate            an unfinished row has this unique_key: use `.row_id`, or another key
    ├── WorkerEnded          this worker's lease was ended by a rescue: stop what runs, register anew
    └── Fenced               this attempt is no longer yours: undo nothing, write nothing, return

A handler raises one of another tree to say how its attempt ended:

    Outcome
    ├── Retry(delay)         failed; try again after the delay, or by backoff
    ├── Permanent            failed, and retrying is useless: the row is dead
    ├── HandBack(delay)      not failed, only not possible now: spends no attempt
    └── Cancelled            stopped because a cancel was requested
"""

from datetime import timedelta


class OutwakeError(Exception):
    """The root of Outwake's errors."""


class ConfigurationError(OutwakeError):
    """A setting is missing or wrong."""


class SchemaError(OutwakeError):
    """The database's schema is not the one this code works with; the message says what to run."""


class Duplicate(OutwakeError):
    """An unfinished row has this unique_key already."""

    def __init__(self, unique_key: str, row_id: int) -> None:
        super().__init__(f"row {row_id} has the unique_key {unique_key!r} and is not finished")
        self.unique_key = unique_key
        self.row_id = row_id


class WorkerEnded(OutwakeError):
    """This worker's lease was ended: its rows were given to others, and it may never claim again."""


class Fenced(OutwakeError):
    """This attempt's row was rescued, cancelled or claimed again: nothing was written."""

    def __init__(self, row_id: int, attempt: int) -> None:
        super().__init__(f"attempt {attempt} of row {row_id} is fenced")
        self.row_id = row_id
        self.attempt = attempt


class Outcome(Exception):
    """How an attempt ended, raised by its handler."""


class Retry(Outcome):
    """The attempt failed; try again after `delay`, or by exponential backoff if it is None."""

    def __init__(self, reason: str, delay: timedelta | None = None) -> None:
        super().__init__(reason)
        self.delay = delay


class Permanent(Outcome):
    """The attempt failed and retrying is useless: the row becomes dead at once."""


class HandBack(Outcome):
    """The attempt could not be made now: the row is ready again after `delay`, no failure counted."""

    def __init__(self, reason: str, delay: timedelta = timedelta(0)) -> None:
        super().__init__(reason)
        self.delay = delay


class Cancelled(Outcome):
    """The attempt was stopped because its row is to be cancelled."""
