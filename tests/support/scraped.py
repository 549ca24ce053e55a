"""Metrics as Prometheus reads them."""

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.support.process import Process
from tests.support.waits import TIMEOUT

_ORDER = ["topic", "state", "wait", "outcome", "cause", "kind", "method", "route", "status", "le"]

Samples = dict[tuple[str, ...], float]


def samples(text: str) -> Samples:
    """(name, label values in the order of _ORDER) -> value."""
    return {
        (sample.name, *(sample.labels[name] for name in _ORDER if name in sample.labels)): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def scrape(worker: Process) -> Samples:
    ready = await worker.event("health_ready")
    async with httpx.AsyncClient(timeout=TIMEOUT) as client:
        answer = await client.get(f"http://127.0.0.1:{ready['port']}/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return samples(answer.text)
