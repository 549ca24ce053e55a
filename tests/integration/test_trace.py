"""One trace from the request to the result, through two real processes, and a collector on loopback."""

import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from outwake._enqueue import enqueue
from outwake.errors import ConfigurationError
from outwake.telemetry import trace
from outwake.worker.errors import TransientError
from outwake.worker.sandboxes.aio import AioSandbox
from outwake.worker.sandboxes.allocator import AllocatorProvider
from tests.conftest import Connect
from tests.support.process import running
from tests.support.receiver import Receiver, receiver
from tests.support.steps import one, until
from tests.support.waits import TIMEOUT

TRACE = "0af7651916cd43dd8448eb211c80319c"
CLIENT = "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{CLIENT}-01"


def spans(collector: Receiver) -> dict[str, dict[str, Any]]:
    """What has been received, by name."""
    found: dict[str, dict[str, Any]] = {}
    for post in collector.posts:
        assert post.path == "/v1/traces"
        request = ExportTraceServiceRequest()
        request.ParseFromString(post.body)
        for resource in request.resource_spans:
            service = next(
                a.value.string_value for a in resource.resource.attributes if a.key == "service.name"
            )
            for scope in resource.scope_spans:
                for span in scope.spans:
                    found[span.name] = {
                        "service": service,
                        "trace": span.trace_id.hex(),
                        "id": span.span_id.hex(),
                        "parent": span.parent_span_id.hex(),
                        "failed": span.status.code == 2,
                        "attributes": {a.key for a in span.attributes},
                    }
    return found


async def test_one_trace_from_request_to_result(database: str, tmp_path: Path, connect: Connect) -> None:
    conn = await connect()
    async with receiver() as collector:
        env: dict[str, str | None] = {
            "DATABASE_URL": database,
            "OUTWAKE_PORT": "0",
            "OUTWAKE_LOG_LEVEL": "debug",
            "OUTWAKE_ALLOW_FILE_REPOS": "1",
            "OUTWAKE_WORKSPACE_ROOT": str(tmp_path),
            "OUTWAKE_AGENT_COMMAND": shlex.join([sys.executable, "-c", "pass"]),
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        }
        async with (
            running("outwake", "api", env=env) as api,
            running("worker", "--topics", "session.run,sandbox.return", env=env) as worker,
        ):
            port = (await api.event("api_ready"))["port"]
            await worker.event("parked")
            async with httpx.AsyncClient(timeout=TIMEOUT) as client:
                answer = await client.post(
                    f"http://127.0.0.1:{port}/sessions",
                    json={"repo": "file:///no/such/repository", "target_branch": "main", "prompt": "x"},
                    headers={"traceparent": TRACEPARENT},
                )
            assert answer.status_code == 201
            await until(
                conn,
                "SELECT count(*) = 2 FROM outbox WHERE state NOT IN ('ready', 'running')"
                " AND topic IN ('session.run', 'sandbox.return')",
            )
            request = await api.event("request", route="/sessions")
            started = await worker.event("started", topic="session.run")
            ended = await worker.event("ended", topic="session.run")
            assert {request["trace_id"], started["trace_id"], ended["trace_id"]} == {TRACE}
            for process in (api, worker):
                process.send(signal.SIGTERM)
                assert await process.ended() == 0
    found = spans(collector)
    post, run, back = (
        found[name] for name in ("POST /sessions", "session.run attempt", "sandbox.return attempt")
    )
    assert {span["trace"] for span in (post, run, back)} == {TRACE}
    assert post["parent"] == CLIENT
    assert run["parent"] == back["parent"] == post["id"]
    assert (post["service"], run["service"]) == ("outwake-api", "outwake-worker")
    assert (post["failed"], run["failed"], back["failed"]) == (False, True, False)
    assert {"http.route", "http.response.status_code"} <= post["attributes"]
    assert {"outwake.outbox_id", "outwake.attempt", "outwake.topic"} <= run["attributes"]


async def test_off_unless_configured(database: str, connect: Connect) -> None:
    """The traceparent is handed on as it came, and log lines carry it, without a line of OpenTelemetry."""
    env: dict[str, str | None] = {"DATABASE_URL": database, "OUTWAKE_PORT": "0"}
    async with running("outwake", "api", env=env) as api, httpx.AsyncClient(timeout=TIMEOUT) as client:
        port = (await api.event("api_ready"))["port"]
        asked = {"repo": "octo/tools", "target_branch": "main", "prompt": "x"}
        for given in (TRACEPARENT, "nonsense"):
            await client.post(f"http://127.0.0.1:{port}/sessions", json=asked, headers={"traceparent": given})
        assert (await api.event("request", trace_id=TRACE))["status"] == 201
    conn = await connect()
    stored = "SELECT array_agg(traceparent::text ORDER BY id) FROM outbox WHERE topic = 'session.run'"
    assert await one(conn, stored) == [TRACEPARENT, None]


async def test_rows_enqueued_within_a_span_belong_to_it(connect: Connect) -> None:
    conn = await connect()
    with trace.span("test", TRACEPARENT, "consumer") as span:
        assert span.traceparent == trace.current() == TRACEPARENT
        assert trace.headers() == {"traceparent": TRACEPARENT}
        row_id = await enqueue(conn, "t")
    assert trace.current() is None
    assert trace.headers() == {}
    assert await one(conn, "SELECT traceparent FROM outbox WHERE id = %s", row_id) == TRACEPARENT


async def test_calls_of_sandboxes_and_the_allocator_carry_it() -> None:
    async with receiver() as sandbox, receiver() as allocator:
        with trace.span("test", TRACEPARENT, "consumer"):
            async with AioSandbox.connect({"api_url": sandbox.url}) as client:
                with pytest.raises(TransientError):  # it says nothing
                    await client.write("x", b"y")
            with pytest.raises(TransientError):
                await AllocatorProvider(allocator.url, 0, 0).release({})
        for asked in (sandbox, allocator):
            assert asked.posts[0].headers["traceparent"] == TRACEPARENT


@pytest.mark.parametrize(
    ("variables", "wrong"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER"),
        (
            {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            "OTEL_EXPORTER_OTLP_PROTOCOL",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], wrong: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=wrong):
        trace.configure("test")


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"},
        {"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"},
    ],
)
def test_off(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    trace.configure("test")
    assert not trace.exporting()
