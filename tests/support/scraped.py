"""Metrics as Prometheus reads them."""

from prometheus_client.parser import text_string_to_metric_families

_ORDER = ["topic", "state", "wait", "outcome", "cause", "kind", "method", "route", "status", "le"]

Samples = dict[tuple[str, ...], float]


def samples(text: str) -> Samples:
    """(name, label values in the order of _ORDER) -> value."""
    return {
        (sample.name, *(sample.labels[name] for name in _ORDER if name in sample.labels)): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
