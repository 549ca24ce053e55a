"""Metrics of an API process: its requests, their results and durations, and the database's figures.

A duration ends at the first byte of the answer, because an event stream lasts as long as its client stays.
"""

import asyncio
from collections.abc import Iterator
from functools import cache

import psycopg
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from starlette.requests import Request
from starlette.responses import Response

from outwake.app.api.problems import Problem
from outwake.app.auth.identity import Identity
from outwake.app.context import Context, context
from outwake.app.shared_figure import Shared
from outwake.telemetry.metrics import CONTENT_TYPE, database_metrics, render, unreachable

REGISTRY = CollectorRegistry()
BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
DATABASE_TIMEOUT = 3.0  # seconds

_REQUESTS = Counter(
    "outwake_http_requests", "Requests answered.", ["method", "route", "status"], registry=REGISTRY
)
_SECONDS = Histogram(
    "outwake_http_request_seconds",
    "To the first byte of the answer.",
    ["method", "route"],
    buckets=BOUNDS,
    registry=REGISTRY,
)
IN_PROGRESS = Gauge(
    "outwake_http_requests_in_progress", "Requests and event streams being answered.", registry=REGISTRY
)
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}


def count(method: str, route: str | None, status: int, seconds: float) -> None:
    """Count an answered request; `seconds` is the time to the first byte."""
    # All unknown routes share one label, and so do all unknown methods: a stranger must not create labels.
    requests, durations = _counters(method if method in _METHODS else "other", route or "none", status)
    requests.inc()
    durations.observe(seconds)


@cache
def _counters(method: str, route: str, status: int) -> tuple[Counter, Histogram]:
    """Cached, because a lookup by labels is slow."""
    return _REQUESTS.labels(method, route, str(status)), _SECONDS.labels(method, route)


async def metrics(request: Request, identity: Identity) -> Response:
    """This process's counters, and the database's figures of the last moment."""
    here = context(request)
    text = render(REGISTRY.collect(), _listening(here), await _DATABASE.get(here))
    return Response(text, media_type=CONTENT_TYPE)


def _listening(here: Context) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "outwake_api_listen_connected",
        "Whether the connection that feeds the event streams is open.",
        value=here.hub.listening,
    )


async def _database(here: Context) -> list[Metric]:
    try:
        async with asyncio.timeout(DATABASE_TIMEOUT), here.database.connection() as conn:
            return await database_metrics(conn)
    except (psycopg.Error, Problem, TimeoutError):
        return unreachable()


_DATABASE = Shared(_database)
