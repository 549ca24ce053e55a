"""A transactional outbox on Postgres: enqueue in your transaction, claim with a lease, complete fenced."""

from outbox.claim import Claimed, claim, complete, complete_and_claim, fail, fence, hand_back, register, renew
from outbox.enqueue import enqueue, enqueue_many
from outbox.errors import (
    Cancelled,
    ConfigurationError,
    Duplicate,
    Fenced,
    HandBack,
    Outcome,
    Permanent,
    Retry,
    SchemaError,
    SendoffError,
    WorkerEnded,
)
from outbox.handler import Handler, Job
from outbox.migrate import migrate

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
    "Permanent",
    "Retry",
    "SchemaError",
    "SendoffError",
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
