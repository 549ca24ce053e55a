"""What a log line holds, and what never gets into one."""

import io
import json
import logging
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from outwake.telemetry import log

SECRET = "s3cr3t-value"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []  # basicConfig(force=True) would close pytest's
    yield
    root.handlers = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()


@pytest.fixture
def stream() -> io.StringIO:
    stream = io.StringIO()
    log.configure(stream=stream)
    return stream


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_one_json_object_with_a_utc_time(stream: io.StringIO) -> None:
    log.get_logger("outwake.worker.engine.claims").info("claimed", rows=3, note="two\nlines, é")
    (line,) = lines(stream)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "claimed",
        "level": "info",
        "module": "outwake.worker.engine.claims",
        "rows": 3,
        "note": "two\nlines, é",
    }


async def test_what_a_job_bound_is_on_its_lines_also_in_its_threads(stream: io.StringIO) -> None:
    logger = log.get_logger("worker")
    with structlog.contextvars.bound_contextvars(session="s1", outbox_id=7, attempt=2):
        logger.info("claimed")
        await anyio.to_thread.run_sync(lambda: logger.info("cloned"))
        logging.getLogger("psycopg").warning("slow")
    logger.info("parked")
    *of_job, parked = lines(stream)
    assert [(line["session"], line["outbox_id"], line["attempt"]) for line in of_job] == [("s1", 7, 2)] * 3
    assert "session" not in parked


def test_standard_library_logs_come_out_the_same_way(stream: io.StringIO) -> None:
    logging.getLogger("uvicorn.error").warning("port %d", 8000)
    logging.getLogger("uvicorn.error").debug("hidden by the level")
    (line,) = lines(stream)
    assert line["event"] == "stdlib_log"
    assert line["message"] == "port 8000"
    assert line["module"] == "uvicorn.error"
    assert line["level"] == "warning"


def test_an_exception_is_one_line_without_secrets(stream: io.StringIO) -> None:
    for logger in (log.get_logger("worker"), logging.getLogger("psycopg")):
        try:
            raise RuntimeError(f"postgresql://me:{SECRET}@db/x refused")
        except RuntimeError:
            logger.exception("failed")
    for line in lines(stream):
        assert "RuntimeError: postgresql://me:***@db/x refused" in line["exception"]
    assert len(lines(stream)) == 2


def test_a_terminal_gets_text_without_secrets() -> None:
    stream = Terminal()
    log.configure(stream=stream)
    log.get_logger("worker").info("claimed", git_token=SECRET, url=f"https://{SECRET}@host/x")
    text = stream.getvalue()
    assert "claimed" in text
    assert not text.startswith("{")
    assert SECRET not in text


@pytest.mark.parametrize("level", ["LOUD", ""])
def test_an_unknown_level_is_refused(level: str) -> None:
    with pytest.raises(ValueError, match="unknown log level"):
        log.configure(level=level)


@pytest.mark.parametrize(
    "name",
    [
        "token", "borrow_token", "accessToken", "GITHUB_TOKEN", "Authorization", "password",
        "api_key", "apiKey", "x-api-key", "client_secret", "cookie", "tokens",
    ],
)  # fmt: skip
@pytest.mark.parametrize("depth", [0, 2])
def test_fields_named_like_secrets_are_hidden(stream: io.StringIO, name: str, depth: int) -> None:
    fields: dict[str, Any] = {name: SECRET}
    for _ in range(depth):
        fields = {"part": [fields]}
    log.get_logger("x").info("returned", **fields)
    assert SECRET not in stream.getvalue()
    assert log.HIDDEN in stream.getvalue()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"postgresql://me:{SECRET}@db:5432/x?a=b", "postgresql://me:***@db:5432/x?a=b"),
        (f"https://{SECRET}@github.com/a/b", "https://***@github.com/a/b"),
        (f"https://x-access-token:{SECRET}@github.com/a", "https://***@github.com/a"),
        (f"redis://:{SECRET}@cache", "redis://:***@cache"),
        (f"Authorization: Bearer {SECRET}", "Authorization: Bearer ***"),
        (f"GET /x?access_token={SECRET}&page=2", "GET /x?access_token=***&page=2"),
        (f"host=db password='{SECRET} x' user=me", "host=db password=*** user=me"),
        (f'{{"api_key": "{SECRET}", "a": 1}}', '{"api_key": ***, "a": 1}'),
    ],
)
def test_secrets_inside_texts_are_hidden(text: str, shown: str) -> None:
    assert log.redact_text(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "ssh://git@github.com/a/b.git",
        "git@github.com:a/b.git",
        "http://127.0.0.1:8000/sessions/1@2",
        "mail me@example.org, at 10:30",
        "a basic idea; bearer of news",
    ],
)
def test_harmless_texts_stay(text: str) -> None:
    assert log.redact_text(text) == text


def test_values_keep_their_kind_and_counts_of_tokens_are_shown(stream: io.StringIO) -> None:
    unique = uuid.UUID(int=7)
    log.get_logger("x").info("used", input_tokens=12, ok=True, none=None, part=1.5, id=unique, token=None)
    (line,) = lines(stream)
    assert line["input_tokens"] == 12
    assert line["ok"] is True
    assert line["none"] is None
    assert line["part"] == 1.5
    assert line["id"] == str(unique)
    assert line["token"] is None


@given(st.text(alphabet="abcXYZ019_~-.!$%", min_size=8), st.sampled_from(["https", "postgresql"]))
def test_no_password_of_a_url_survives(password: str, scheme: str) -> None:
    assert password not in log.redact_text(f"at {scheme}://u:{password}@h/ we")


def test_known_secrets_are_hidden_wherever_they_stand(stream: io.StringIO) -> None:
    log.hide([SECRET, "abc"])
    try:
        log.get_logger("x").info(
            "said", text=f"<{SECRET}> abc", deep=[{"a": SECRET}], error=ValueError(SECRET)
        )
    finally:
        log.hide([])
    (line,) = lines(stream)
    assert (line["text"], line["deep"], line["error"]) == ("<***> abc", [{"a": "***"}], "***")


def test_threads_do_not_mix_lines(stream: io.StringIO) -> None:
    logger = log.get_logger("x")

    def say() -> None:
        for _ in range(200):
            logger.info("said", text="x" * 500)

    threads = [threading.Thread(target=say) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lines(stream)) == 800
