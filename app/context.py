"""The objects that all routes share. A process makes them once."""

from dataclasses import dataclass

from starlette.requests import Request

from outwake.app.auth.identity import Authenticator
from outwake.app.auth.limits import Limits
from outwake.app.database import Database
from outwake.app.live.hub import Hub
from outwake.app.live.presence import WorkerPresence
from outwake.settings import Settings
from outwake.telemetry.stuck import StuckWatch


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
