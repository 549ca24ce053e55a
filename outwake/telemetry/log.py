"""Logs: one JSON object a line on stderr, or readable text when stderr is a terminal.

`event` is a word in snake_case that a person can search for and a test can wait for. Everything else is a
field. Every line of a job carries the fields of `log_context` (`session_id`, `outbox_id`, `attempt`) and the
fields bound with `structlog.contextvars`, also in threads that asyncio or anyio started for the job.

The standard library's loggers (uvicorn, psycopg) are written in the same form, with the event `stdlib_log`
and their text as `message`. Start uvicorn with `log_config=None`, or it writes its own lines.

Secrets are removed last, from every line: by a field's name, and inside texts by their form. This is a second
safeguard: do not log secrets.
"""

import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, TextIO, cast
from urllib.parse import quote

from outwake.lean import without

with without("rich", "greenlet"):  # for coloured tracebacks and greenlets: memory that a worker saves
    import structlog
    from structlog.contextvars import bound_contextvars as bound_contextvars
    from structlog.typing import EventDict, Processor

HIDDEN = "***"
SHORTEST = 6
"""Characters of a secret; a shorter value would hide ordinary words."""

_SECRET_NAME = re.compile(
    r"token|authorization|password|passwd|secret|api[_-]?key|private[_-]?key|cookie|credential",
    re.IGNORECASE,
)
_COUNT_NAME = re.compile(r"tokens$", re.IGNORECASE)  # a language model's token counts are not secret

# `kept` is the text before a secret, which stays; the rest of the match is hidden. A match begins with a
# fixed word, and the repeated part after it cannot contain that word. So each search is linear in the text.
_SECRET_TEXTS = [
    re.compile(r"(?P<kept>\bhttps?://)[^\s/?#@]+(?=@)", re.IGNORECASE),  # the user may be a token
    re.compile(r"(?P<kept>://[^\s/?#:@]*:)[^\s/?#@]+(?=@)"),
    re.compile(r"(?P<kept>\b(?:bearer|basic)\s+)[\w.~+/=-]{8,}", re.IGNORECASE),
]

# name=value in three steps: one pattern for all would try each place of a long word anew.
_PAIR_NAME = re.compile(r"token|password|passwd|secret|api[_-]?key", re.IGNORECASE)
_REST_OF_NAME = re.compile(r"[\w-]*")
_PAIR_VALUE = re.compile(r"(?P<kept>[\"']?\s*[=:]\s*)(?:\"[^\"]*\"|'[^']*'|[^\s&,;\"']+)")

# Every text that one of those matches contains one of these.
_SUSPECT = re.compile(r"://|bearer|basic|token|passw|secret|key", re.IGNORECASE)

LONGEST = 16 * 1024
"""Characters of one text in a log line. A longer one is cut before it is searched for secrets."""


def get_logger(name: str) -> structlog.typing.FilteringBoundLogger:
    """A logger whose lines carry `module=name`. It may be made before `configure` is called."""
    return cast(structlog.typing.FilteringBoundLogger, structlog.get_logger(module=name))


log_context: ContextVar[Callable[[], Mapping[str, Any]] | None] = ContextVar("log_context", default=None)
"""Returns the fields that every line of this context carries. It is called only when a line is written, so it
costs less than structlog's bind_contextvars.
"""

_level = logging.INFO
_known: list[str] = []


def writes(level: int) -> bool:
    """Whether lines of this level are written. Check this first in code that runs for every row or request,
    because structlog takes time for a suppressed line too.
    """
    return level >= _level


def debugging() -> bool:
    """Whether debug lines are written."""
    return writes(logging.DEBUG)


def _merge_about(_logger: Any, _method: str, event: EventDict) -> EventDict:
    fields = log_context.get()
    return event if fields is None else {**fields(), **event}


def configure(*, level: str = "INFO", stream: TextIO | None = None) -> None:
    """Send all logs to `stream` (stderr by default). Call it once, first thing in a process.

    Raises ValueError for a level that `logging` does not know.
    """
    stream = stream or sys.stderr
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"unknown log level {level!r}")
    global _level
    _level = number
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        _merge_about,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
    ]
    last: list[Processor] = [redact, _renderer(stream)]
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=stream),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, _name_foreign],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    logging.basicConfig(handlers=[handler], level=number, force=True)
    logging.captureWarnings(capture=True)
    for chatty in ("httpx", "httpcore"):  # they write lines for each request, including headers
        logging.getLogger(chatty).setLevel(max(number, logging.WARNING))


def hide(secrets: Iterable[str]) -> None:
    """Replace these values in every line from now on, wherever they stand."""
    global _known
    spelled = {form for value in secrets for form in (value, quote(value, safe="")) if len(value) >= SHORTEST}
    _known = sorted(spelled, key=len, reverse=True)  # one value may be part of another


def redact(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """Replace everything that looks like a secret, at any depth."""
    return {name: _redact_field(name, value) for name, value in event.items()}


def _redact_field(name: object, value: Any) -> Any:
    if isinstance(name, str) and _is_secret(name):
        is_count = isinstance(value, int) and _COUNT_NAME.search(name)
        return value if value is None or is_count else HIDDEN
    return _redact_value(value)


@lru_cache
def _is_secret(name: str) -> bool:
    return bool(_SECRET_NAME.search(name))


def _redact_value(value: Any) -> Any:
    if isinstance(value, str):
        return redact_text(_without_known(_shortened(value)))
    if isinstance(value, Mapping):
        return {name: _redact_field(name, part) for name, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_redact_value(part) for part in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return redact_text(
        _without_known(_shortened(str(value)))
    )  # types that JSON can't hold: exceptions, paths, UUIDs, times


def redact_text(text: str) -> str:
    """The text without passwords in URLs, bearer tokens and `token=…` pairs. Linear in the text."""
    if not _SUSPECT.search(text):  # most texts: one fast search spares the others
        return text
    for pattern in _SECRET_TEXTS:
        text = pattern.sub(rf"\g<kept>{HIDDEN}", text)
    return _redact_pairs(text)


def _redact_pairs(text: str) -> str:
    kept: list[str] = []
    start = end = 0
    while (name := _PAIR_NAME.search(text, end)) is not None:
        rest = _REST_OF_NAME.match(text, name.end())
        assert rest is not None  # it may be empty
        end = rest.end()
        if (value := _PAIR_VALUE.match(text, end)) is not None:
            kept += (text[start : value.end("kept")], HIDDEN)
            start = end = value.end()
    return "".join((*kept, text[start:])) if kept else text


def _without_known(text: str) -> str:
    for value in _known:
        text = text.replace(value, HIDDEN)
    return text


def _shortened(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    # Not inside of a word: the part before the cut may be what tells that it is a secret.
    cut = text[:LONGEST].rsplit(None, 1)[0]
    return f"{cut} … {len(text) - len(cut)} more characters"


def _renderer(stream: TextIO) -> Processor:
    if stream.isatty():
        plain = structlog.dev.plain_traceback
        return structlog.dev.ConsoleRenderer(exception_formatter=plain)
    return structlog.processors.JSONRenderer(ensure_ascii=False)


def _name_foreign(_logger: Any, _method: str, event: EventDict) -> EventDict:
    record: logging.LogRecord = event["_record"]
    return {**event, "event": "stdlib_log", "message": event["event"], "module": record.name}
