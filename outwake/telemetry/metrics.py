"""Metrics from the database. Every process that is scraped shows the same numbers, so take their maximum, not
their sum.

Queries run only at a scrape. They read partial indexes only, so their cost grows with the waiting rows, not
with the finished ones (a test compares the pages read).
"""

from collections.abc import Iterable, Iterator
from typing import Any

import psycopg
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from outwake.installed import has_sessions
from outwake.schema import in_schema

CONTENT_TYPE = CONTENT_TYPE_LATEST

DEPTH = in_schema(
    """
SELECT 'outbox', topic, state, wait, rows::float8, extract(epoch FROM oldest)::float8
FROM :schema.outbox_depth
UNION ALL
SELECT 'worker', '', state, '', count(*)::float8, 0
FROM :schema.worker_status WHERE ended_at IS NULL GROUP BY state
UNION ALL
SELECT 'writer', '', '', '', count(*)::float8, greatest(max(extract(epoch FROM open_for)), 0)::float8
FROM :schema.outbox_writer
UNION ALL
SELECT 'queue', '', '', '', pg_notification_queue_usage(), 0
"""
)
SANDBOXES = in_schema(
    """
SELECT 'sandbox', '', '', '', count(*)::float8, 0 FROM :schema.session WHERE sandbox IS NOT NULL
UNION ALL
SELECT 'suspect', '', '', '', count(*)::float8, 0 FROM :schema.sandbox_suspect
"""
)

WORKER_STATES = ("parked", "awake", "busy", "draining", "late", "absent", "lost")


async def database_metrics(conn: psycopg.AsyncConnection[Any]) -> list[Metric]:
    """Depth and oldest age by topic and state, workers, sandboxes held, notification queue."""
    cursor = await conn.execute(DEPTH, prepare=False)
    found = await cursor.fetchall()
    if await has_sessions(conn):
        cursor = await conn.execute(SANDBOXES, prepare=False)
        found += await cursor.fetchall()
    return _families(found)


def unreachable() -> list[Metric]:
    """The metrics that replace `database_metrics` when the database does not answer."""
    return [_up(0)]


def _up(value: float) -> Metric:
    return GaugeMetricFamily("outwake_database_up", "Whether the database answered this scrape.", value=value)


def _families(found: Iterable[tuple[Any, ...]]) -> list[Metric]:
    labels = ["topic", "state", "wait"]
    rows = GaugeMetricFamily(
        "outwake_outbox_rows", "Rows of outbox that are not finished, or dead.", labels=labels
    )
    oldest = GaugeMetricFamily(
        "outwake_outbox_oldest_seconds",
        "For how long the oldest row has been due, has run, or has been dead.",
        labels=labels,
    )
    workers = GaugeMetricFamily("outwake_workers", "Workers by what they do.", labels=["state"])
    writers = GaugeMetricFamily(
        "outwake_outbox_writers", "Open transactions that may have written to outbox."
    )
    writer_age = GaugeMetricFamily(
        "outwake_outbox_oldest_writer_seconds", "For how long the oldest of them has been open."
    )
    sandboxes = GaugeMetricFamily("outwake_sandboxes_held", "Sessions that hold a sandbox.")
    suspects = GaugeMetricFamily("outwake_sandboxes_suspected", "Sandboxes that may have leaked.")
    queue = GaugeMetricFamily(
        "outwake_notification_queue_ratio", "How full the server's notification queue is, 0 to 1."
    )
    states = dict.fromkeys(WORKER_STATES, 0.0)
    for kind, topic, state, wait, value, seconds in found:
        match kind:
            case "outbox":
                rows.add_metric([topic, state, wait], value)
                oldest.add_metric([topic, state, wait], seconds)
            case "worker":
                states[state] = value
            case "writer":
                writers.add_metric([], value)
                writer_age.add_metric([], seconds)
            case "sandbox":
                sandboxes.add_metric([], value)
            case "suspect":
                suspects.add_metric([], value)
            case "queue":
                queue.add_metric([], value)
    for state, value in states.items():
        workers.add_metric([state], value)
    return [_up(1), rows, oldest, workers, writers, writer_age, sandboxes, suspects, queue]


class _Once(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def render(*sources: Iterable[Metric]) -> bytes:
    """Families in Prometheus' text format; send them as CONTENT_TYPE."""
    return generate_latest(_Once(family for source in sources for family in source))
