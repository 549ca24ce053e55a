"""What can go wrong between a worker and what it drives.

SessionError              the message is fit for the session's user
├── PermanentError        trying again can't help: the repository isn't there, the command isn't
└── TransientError        trying again may help: the network, a full disk, a branch that moved
    └── Unclear           asked for a sandbox, and nobody knows what was answered: it may have leaked
"""


class SessionError(Exception):
    """A session's work can't go on; the message says why, without secrets."""


class PermanentError(SessionError):
    """Trying again can't help: end the work and show the message."""


class TransientError(SessionError):
    """Trying again may help: retry with backoff."""


class Unclear(TransientError):
    """Asked for a sandbox and got no answer of the allocator's: it may have leaked."""
