"""A transactional outbox on Postgres: enqueue in your transaction, claim with a lease, complete fenced."""

from outwake._enqueue import enqueue, enqueue_many
from outwake.errors import (
    Cancelled,
    ConfigurationError,
    Duplicate,
    Fenced,
    HandBack,
    Outcome,
    OutwakeError,
    Permanent,
    Retry,
    SchemaError,
    WorkerEnded,
)

try:
    import psycopg as _psycopg  # noqa: F401
except ImportError as error:  # It finds no libpq. enqueue works by other drivers; the commands say so.
    _no_libpq = error

    def __getattr__(name: str) -> None:
        if name in __all__:
            raise ImportError("psycopg finds no libpq: pip install 'psycopg[binary]'") from _no_libpq
        raise AttributeError(name)

else:
    from outwake._claim import (
        Claimed,
        claim,
        complete,
        complete_and_claim,
        fail,
        fence,
        hand_back,
        register,
        renew,
    )
    from outwake._migrate import migrate
    from outwake.handler import Handler, Job

__all__ = [
    "Cancelled",
    "Claimed",
    "ConfigurationError",
    "Duplicate",
    "Fenced",
    "HandBack",
    "Handler",
    "Job",
    "Outcome",
    "OutwakeError",
    "Permanent",
    "Retry",
    "SchemaError",
    "WorkerEnded",
    "claim",
    "complete",
    "complete_and_claim",
    "enqueue",
    "enqueue_many",
    "fail",
    "fence",
    "hand_back",
    "migrate",
    "register",
    "renew",
]
