"""Traces: one trace from the request that caused a row to the attempts that served it, and what they call.

1. The API takes the W3C `traceparent` of a request, or begins a trace, and stores it in outbox.traceparent.
2. Each attempt at that row is a span below it. `job.traceparent`, and `headers()` for outgoing requests, name
   that span. A row that the handler enqueues continues the trace.
3. Log lines within a span carry its `trace_id`.

Spans are exported only if the standard variables ask for it (OTEL_EXPORTER_OTLP_ENDPOINT and others, which
OpenTelemetry's SDK reads; extra `otel`). Without them the traceparent is passed on unchanged, so Outwake does
not break a trace.
"""

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal

from outwake.errors import ConfigurationError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

Kind = Literal["server", "consumer", "client"]

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

_current: ContextVar[str | None] = ContextVar("traceparent", default=None)
_provider: "TracerProvider | None" = None


def configured() -> bool:
    """Whether the environment asks for spans."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "")
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    return exporter != "none" and bool(exporter or any(os.environ.get(name) for name in endpoints))


def configure(service: str) -> None:
    """Export spans if the environment asks for it, as `service` unless OTEL_SERVICE_NAME is set.

    Raises ConfigurationError if the extra `otel` is not installed, or for an exporter it does not have.
    """
    global _provider
    if not configured():
        return
    exporter = os.environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    if exporter not in ("otlp", "console"):
        raise ConfigurationError(f"OTEL_TRACES_EXPORTER: otlp, console or none, not {exporter!r}")
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    if protocol != "http/protobuf":
        raise ConfigurationError(f"OTEL_EXPORTER_OTLP_PROTOCOL: only http/protobuf, not {protocol!r}")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter
    except ImportError as error:
        raise ConfigurationError(
            f"OTEL_ variables ask for traces, but {error.name} is missing: pip install 'outwake[otel]'"
        ) from None
    name = os.environ.get("OTEL_SERVICE_NAME") or service
    _provider = TracerProvider(resource=Resource.create({SERVICE_NAME: name}))
    to = ConsoleSpanExporter() if exporter == "console" else OTLPSpanExporter()
    _provider.add_span_processor(BatchSpanProcessor(to))


def exporting() -> bool:
    """Whether spans are made."""
    return _provider is not None


def shutdown() -> None:
    """Export the remaining spans."""
    global _provider
    if _provider is not None:
        _provider.shutdown()
        _provider = None


def current() -> str | None:
    """The traceparent of the current span."""
    return _current.get()


def active() -> str | None:
    """The traceparent of the application's own span of OpenTelemetry, or else of ours.

    Nothing is imported: an application that has a span has loaded OpenTelemetry.
    """
    if (api := sys.modules.get("opentelemetry.trace")) is not None:
        found = api.get_current_span().get_span_context()
        if found.is_valid:
            return _written(found)
    return _current.get()


def headers() -> dict[str, str]:
    """The headers that make an outgoing HTTP request part of this trace."""
    here = _current.get()
    return {} if here is None else {"traceparent": here}


def valid(traceparent: str | None) -> str | None:
    """The same traceparent if it is well-formed, else None: the W3C's rules say to ignore a malformed one."""
    return traceparent if traceparent and _TRACEPARENT.fullmatch(traceparent) else None


def log_fields(traceparent: str | None) -> dict[str, str]:
    """The fields that make a log line outside of the span part of its trace."""
    return {"trace_id": traceparent.split("-")[1]} if traceparent else {}


class Span:
    """A span in progress; if none is exported, only its place in the trace."""

    def __init__(self, traceparent: str | None, span: Any = None) -> None:
        self.traceparent = traceparent
        self._span = span

    def name(self, name: str) -> None:
        """Rename the span."""
        if self._span is not None:
            self._span.update_name(name)

    def note(self, **attributes: str | int | float | None) -> None:
        """Add attributes; `__` in a name stands for a dot. None is left out."""
        if self._span is not None:
            for key, value in attributes.items():
                if value is not None:
                    self._span.set_attribute(key.replace("__", "."), value)

    def fail(self, reason: str) -> None:
        """Mark the span as an error."""
        if self._span is not None:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_status(Status(StatusCode.ERROR, reason))


@contextmanager
def span(
    name: str,
    parent: str | None,
    kind: Kind,
    attributes: Mapping[str, str | int | float] | None = None,
    *,
    not_errors: tuple[type[Exception], ...] = (),
) -> Iterator[Span]:
    """A span below `parent`, a traceparent. Code inside the block finds it by `current`."""
    parent = valid(parent)
    if _provider is None:
        with _inside(parent):
            yield Span(parent)
        return
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    context = TraceContextTextMapPropagator().extract({"traceparent": parent} if parent else {})
    tracer = _provider.get_tracer("outwake")
    with tracer.start_as_current_span(
        name,
        context=context,
        kind=SpanKind[kind.upper()],
        attributes=dict(attributes or {}),
        record_exception=False,
        set_status_on_exception=False,
    ) as opened:
        here = _written(opened.get_span_context())
        made = Span(here, opened)
        with _inside(here):
            try:
                yield made
            except not_errors:
                raise
            except Exception as error:
                made.fail(type(error).__name__)
                raise


def _written(place: Any) -> str:
    """A SpanContext of OpenTelemetry as traceparent."""
    return f"00-{place.trace_id:032x}-{place.span_id:016x}-{place.trace_flags:02x}"


@contextmanager
def _inside(traceparent: str | None) -> Iterator[None]:
    token = _current.set(traceparent)
    try:
        if traceparent is None:
            yield
        else:
            from outwake.telemetry.log import (
                bound_contextvars,  # needs structlog, which only the commands have
            )

            with bound_contextvars(**log_fields(traceparent)):
                yield
    finally:
        _current.reset(token)
