"""What can go wrong between a worker and what it drives.

SessionError              the message is fit for the session's user
├── PermanentError        trying again can't help: the repository isn't there, the command isn't
└── TransientError        trying again may help: the network, a full disk, a branch that moved
"""


class SessionError(Exception):
    """A session's work can't go on; the message says why, without secrets."""


class PermanentError(SessionError):
    """Trying again can't help: end the work and show the message."""


class TransientError(SessionError):
    """Trying again may help: retry with backoff."""
