"""A transactional outbox on Postgres: enqueue in your transaction, claim with a lease, complete fenced."""

from outwake.claim import (
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
from outwake.enqueue import enqueue, enqueue_many
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
from outwake.handler import Handler, Job
from outwake.migrate import migrate

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
