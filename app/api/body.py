"""Reads and checks a request's body, query and headers."""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from outwake.app.api.problems import Problem, invalid
from outwake.app.context import context
from outwake.settings import Settings
from outwake.telemetry import trace

Model = TypeVar("Model", bound=BaseModel)

_EVENT_ID = re.compile(r"([0-9]{1,18})(?:-([0-9a-f]{8}))?")
MAX_FIELDS = 50

_KEY = re.compile(r'"[\x20\x21\x23-\x7e]{1,255}"|[\x21\x23-\x7e]{1,255}')


async def read_body(request: Request, model: type[Model], media_types: tuple[str, ...]) -> Model:
    """The JSON body as `model`. Raises Problem (unsupported-media-type, body-too-large, malformed,
    invalid).
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in media_types:
        raise Problem(
            "unsupported-media-type",
            f"Send the body as {' or '.join(media_types)}.",
            headers={"Accept-Patch" if request.method == "PATCH" else "Accept": ", ".join(media_types)},
        )
    settings = context(request).settings
    text = await read_bytes(request, settings.max_body)
    try:
        # json passes lone surrogates on, so the model can report where they are. pydantic's parser does not.
        content = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        where = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise Problem("malformed", f"The body is not JSON in UTF-8{where}.") from None
    return check_body(model, content, settings)


def check_body(model: type[Model], content: Any, settings: Settings) -> Model:
    """The content of a body or of a form as `model`. Raises Problem (invalid)."""
    if isinstance(content, dict) and len(content) > MAX_FIELDS:  # each would be an error of its own
        raise Problem("invalid", f"The body has more than {MAX_FIELDS} fields.")
    try:
        return model.model_validate(content, context={"settings": settings})
    except ValidationError as error:
        raise invalid(error, "pointer") from None


async def read_bytes(request: Request, limit: int) -> bytes:
    """The body. If it is too large, it is refused as soon as that is known, and the rest is not read."""
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise _too_large(limit)
    limits, user = context(request).limits, getattr(request.state, "user", "")
    read = bytearray()
    held = 0
    try:
        async for chunk in request.stream():
            held += len(chunk)
            limits.hold_body(user, len(chunk))
            read += chunk
            if len(read) > limit:
                raise _too_large(limit)
    except ClientDisconnect:
        raise Problem("malformed", "The body ended early.") from None
    finally:
        limits.drop_body(user, held)
    return bytes(read)


def _too_large(limit: int) -> Problem:
    return Problem("body-too-large", f"The limit is {limit} bytes.", headers={"Connection": "close"})


def read_query(request: Request, model: type[Model]) -> Model:
    """The query string as `model`. Raises Problem (invalid)."""
    given: dict[str, Any] = {}
    for name, value in request.query_params.multi_items():
        if len(given) > MAX_FIELDS:
            raise Problem("invalid", f"The query has more than {MAX_FIELDS} parameters.")
        if name in given:
            raise Problem(
                "invalid",
                "1 field cannot be accepted.",
                errors=[{"parameter": name, "detail": "is given twice"}],
            )
        given[name] = value
    return check_query(model, given)


def check_query(model: type[Model], given: Mapping[str, Any]) -> Model:
    """Parameters as `model`. Raises Problem (invalid)."""
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise invalid(error, "parameter") from None


def idempotency_key(request: Request) -> str | None:
    """The Idempotency-Key. The draft standard wants it quoted; without quotes it is the same key."""
    given = request.headers.getlist("idempotency-key")
    if not given:
        return None
    if len(given) > 1:
        raise _bad_key()
    return check_key(given[0])


def check_key(text: str) -> str:
    """The Idempotency-Key without quotes. Raises Problem (invalid)."""
    if not _KEY.fullmatch(text):
        raise _bad_key()
    return text.strip('"')


def _bad_key() -> Problem:
    return _bad_header("Idempotency-Key", "must be one string of 1 to 255 ASCII characters")


class EventId(NamedTuple):
    """The seq of the client's last message, and the mark of the last state, if it has that too."""

    seq: int
    mark: str | None


def last_event_id(request: Request) -> EventId | None:
    """The id of the last event that the client has. Raises Problem (invalid)."""
    given = request.headers.get("last-event-id")
    if given is None or given == "":
        return None
    found = _EVENT_ID.fullmatch(given)
    if found is None:
        raise _bad_header("Last-Event-ID", "must be the id of an event of this stream")
    return EventId(int(found[1]), found[2])


def traceparent(request: Request) -> str | None:
    """The W3C trace context. As its standard says, a malformed one is ignored."""
    return trace.current() or trace.valid(request.headers.get("traceparent"))


def check_accept(request: Request, media_type: str) -> None:
    """Raise Problem (not-acceptable) if the client rules this media type out."""
    given = request.headers.getlist("accept")
    if not given or not ",".join(given).strip():
        return
    kind = media_type.partition("/")[0]
    best = {media_type: -1, f"{kind}/*": -1, "*/*": -1}
    for part in ",".join(given).split(","):
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        if name in best:
            weights = [value[2:] for value in parameters if value.startswith("q=")]
            refused = bool(weights) and bool(re.fullmatch(r"0(\.0*)?", weights[0]))
            best[name] = 0 if refused else 1
    decided = next((weight for weight in best.values() if weight >= 0), 0)
    if not decided:
        raise Problem("not-acceptable", f"This resource is given as {media_type} only.")


def _bad_header(name: str, detail: str) -> Problem:
    return Problem("invalid", "1 field cannot be accepted.", errors=[{"header": name, "detail": detail}])
