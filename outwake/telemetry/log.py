"""Logs: one JSON object a line on stderr, or readable text when stderr is a terminal.

`event` is a word in snake_case that a person can search for and a test can wait for; everything else
is a field. What `about` gives (`session_id`, `outbox_id`, `attempt`), and fields bound with
`structlog.contextvars`, are on every line of the job, in threads that asyncio or anyio started for it
as well.

The standard library's loggers (uvicorn, psycopg) come out the same way, with the event `stdlib_log`
and their text as `message`. Start uvicorn with `log_config=None`, or it takes its lines back.

Secrets are removed last, from everything: by the name of a field, and inside texts where they look
like one. That is a net, not a licence: don't log them.
"""

import logging
import re
import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, TextIO, cast

from outwake.lean import without

with without("rich", "greenlet"):  # for tracebacks in colours, and greenlets: 2 MB of a worker
    import structlog
    from structlog.contextvars import bound_contextvars as bound_contextvars
    from structlog.typing import EventDict, Processor

HIDDEN = "***"

_SECRET_NAME = re.compile(
    r"token|authorization|password|passwd|secret|api[_-]?key|private[_-]?key|cookie|credential",
    re.IGNORECASE,
)
_COUNT_NAME = re.compile(r"tokens$", re.IGNORECASE)  # of a language model: a number, no secret

# What goes before a secret in a text is kept, the rest up to its end is not.
_SECRET_TEXTS = [
    re.compile(r"(?P<kept>\bhttps?://)[^\s/?#@]+(?=@)", re.IGNORECASE),  # a token can be the user
    re.compile(r"(?P<kept>\b[a-z][a-z0-9+.-]*://[^\s/?#:@]*:)[^\s/?#@]+(?=@)", re.IGNORECASE),
    re.compile(r"(?P<kept>\b(?:bearer|basic)\s+)[\w.~+/=-]{8,}", re.IGNORECASE),
    re.compile(
        r"(?P<kept>[\w-]*(?:token|password|passwd|secret|api[_-]?key)[\w-]*[\"']?\s*[=:]\s*)"
        r"(?:\"[^\"]*\"|'[^']*'|[^\s&,;\"']+)",
        re.IGNORECASE,
    ),
]

# One of these is in whatever those find.
_SUSPECT = re.compile(r"://|bearer|basic|token|passw|secret|key", re.IGNORECASE)


def get_logger(name: str) -> structlog.typing.FilteringBoundLogger:
    """A logger whose lines carry `module=name`. May be made before `configure` is called."""
    return cast(structlog.typing.FilteringBoundLogger, structlog.get_logger(module=name))


about: ContextVar[Callable[[], Mapping[str, Any]] | None] = ContextVar("about", default=None)
"""What gives the fields that every line of this context carries. It is asked when a line is written;
structlog's bind_contextvars takes 1.5 us for three fields, also where none is.
"""

_level = logging.INFO


def writes(level: int) -> bool:
    """Whether lines of this level are written. One that is not takes structlog 2 to 4 us: worth to be asked
    first where it stands for every row or request.
    """
    return level >= _level


def debugging() -> bool:
    """Whether debug lines are written."""
    return writes(logging.DEBUG)


def _merge_about(_logger: Any, _method: str, event: EventDict) -> EventDict:
    fields = about.get()
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
    for chatty in ("httpx", "httpcore"):  # a line and more for each request, headers included
        logging.getLogger(chatty).setLevel(max(number, logging.WARNING))


def redact(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """Replace what looks like a secret, at any depth."""
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
        return redact_text(value)
    if isinstance(value, Mapping):
        return {name: _redact_field(name, part) for name, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_redact_value(part) for part in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return redact_text(str(value))  # what JSON can't hold: exceptions, paths, UUIDs, times


def redact_text(text: str) -> str:
    """The text without passwords in URLs, bearer tokens and `token=…` pairs."""
    if not _SUSPECT.search(text):  # most texts: 60 us less of 90 that a line took
        return text
    for pattern in _SECRET_TEXTS:
        text = pattern.sub(rf"\g<kept>{HIDDEN}", text)
    return text


def _renderer(stream: TextIO) -> Processor:
    if stream.isatty():
        plain = structlog.dev.plain_traceback
        return structlog.dev.ConsoleRenderer(exception_formatter=plain)
    return structlog.processors.JSONRenderer(ensure_ascii=False)


def _name_foreign(_logger: Any, _method: str, event: EventDict) -> EventDict:
    record: logging.LogRecord = event["_record"]
    return {**event, "event": "stdlib_log", "message": event["event"], "module": record.name}
