"""What the routes share, made once a process."""

from dataclasses import dataclass

from starlette.requests import Request

from app.database import Database
from app.hub import Hub
from app.identity import Authenticator
from app.limits import Limits
from app.presence import WorkerPresence
from outbox.settings import Settings
from outbox.stuck import StuckWatch


@dataclass(frozen=True)
class Context:
    settings: Settings
    database: Database
    presence: WorkerPresence
    hub: Hub
    stuck: StuckWatch
    authenticator: Authenticator
    limits: Limits


def context(request: Request) -> Context:
    found = request.app.state.context
    assert isinstance(found, Context)
    return found
