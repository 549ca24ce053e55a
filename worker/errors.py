"""Errors between a worker and the systems it drives.

SessionError              the message may be shown to the session's user
├── PermanentError        a retry can't help: the repository or the command doesn't exist
└── TransientError        a retry may help: the network, a full disk, a branch that moved
    └── OutcomeUnknown    the outcome of a borrow is unknown: a sandbox may have leaked
"""


class SessionError(Exception):
    """A session's work can't continue. The message says why, without secrets."""


class PermanentError(SessionError):
    """A retry can't help: end the work and show the message."""


class TransientError(SessionError):
    """A retry may help: retry with backoff, after `after` seconds at the earliest."""

    def __init__(self, message: str, after: float = 0) -> None:
        super().__init__(message)
        self.after = after


class OutcomeUnknown(TransientError):
    """We asked for a sandbox and got no answer from the allocator: a sandbox may have leaked."""
