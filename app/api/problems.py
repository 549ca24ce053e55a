"""Errors as RFC 9457 problem details.

Every error of this API is one of KINDS. `type` is `urn:outwake:problem:KIND`. `title` and `status` belong
to the kind; `detail` describes this case. `errors` lists what is wrong with the request, each with its place:
a `pointer` into the body (a JSON pointer), a `parameter` of the query, or a `header`.
"""

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import psycopg
from psycopg import errors as pg
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from outwake.telemetry.log import get_logger

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER = 2  # seconds; during an outage the API probes about once a second

KINDS: dict[str, tuple[int, str]] = {
    "malformed": (400, "The request cannot be read"),
    "unauthorized": (401, "Who asks is not known"),
    "forbidden": (403, "This is not allowed"),
    "not-found": (404, "There is no such thing"),
    "method-not-allowed": (405, "This path does not take this method"),
    "not-acceptable": (406, "No media type that was asked for can be given"),
    "branch-taken": (409, "Another session works on this branch"),
    "archived": (409, "The session is archived"),
    "session-full": (409, "The session has as many prompts as it may"),
    "wrong-state": (409, "The row's state does not allow this"),
    "body-too-large": (413, "The body is too large"),
    "unsupported-media-type": (415, "The body's media type is not understood"),
    "invalid": (422, "The request is not valid"),
    "key-reused": (422, "The Idempotency-Key was used for another request"),
    "too-many-requests": (429, "Too many requests"),
    "too-many-sessions": (429, "Too many unfinished sessions"),
    "too-many-streams": (429, "Too many event streams"),
    "internal": (500, "Something went wrong here"),
    "unavailable": (503, "The database is not available"),
    "not-ready": (503, "This process is not ready"),
}

log = get_logger("outwake.app.api.problems")


class Problem(Exception):
    """The request fails. `kind` is one of KINDS."""

    def __init__(
        self,
        kind: str,
        detail: str,
        *,
        errors: Sequence[Mapping[str, str]] = (),
        headers: Mapping[str, str] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(detail)
        self.kind = kind
        self.status, self.title = KINDS[kind]
        self.document: dict[str, Any] = {
            "type": f"urn:outwake:problem:{kind}",
            "title": self.title,
            "status": self.status,
            "detail": detail,
            **more,
        }
        if errors:
            self.document["errors"] = list(errors)
        self.headers = dict(headers or {})
        if self.status == 503:
            self.headers.setdefault("Retry-After", str(RETRY_AFTER))

    def response(self) -> Response:
        body = json.dumps(self.document).encode()  # ASCII, because a field's name may be a lone surrogate
        return Response(body, self.status, self.headers, MEDIA_TYPE)


def unavailable(detail: str = "The database does not answer; try again.") -> Problem:
    return Problem("unavailable", detail)


def invalid(error: ValidationError, place: str) -> Problem:
    """pydantic's errors with their places. `place` is `pointer` (in the body), `parameter` or `header`."""
    errors = []
    for found in error.errors(include_url=False, include_input=False):
        detail = found["msg"]
        if found["type"] == "value_error":
            detail = str(found["ctx"]["error"])
        elif found["type"] == "extra_forbidden":
            detail = "is not known here"
        errors.append({place: _locate(found["loc"], place), "detail": detail})
    word = "field" if len(errors) == 1 else "fields"
    return Problem("invalid", f"{len(errors)} {word} cannot be accepted.", errors=errors)


def _locate(location: tuple[int | str, ...], place: str) -> str:
    names = [str(part) for part in location]
    if place != "pointer":
        return names[0] if names else ""
    escaped = (name.replace("~", "~0").replace("/", "~1") for name in names)
    return "#" + "".join("/" + quote(name, safe="~", errors="replace") for name in escaped)


def of_database(error: psycopg.Error) -> Problem:
    """The problem for a database error. It is 503 if the error may pass or an operator can repair it."""
    match error:
        case pg.UndefinedTable() | pg.UndefinedFunction() | pg.UndefinedColumn():
            log.error("schema_missing", error=str(error))
            return unavailable("The database's schema is not this version's: run `outwake migrate`.")
        case pg.ReadOnlySqlTransaction():
            return unavailable("The database is read-only; try again.")
        case pg.DiskFull():
            return unavailable("The database's disk is full; try again.")
        case pg.QueryCanceled() | pg.LockNotAvailable():
            return unavailable("The database took too long; try again.")
        case psycopg.OperationalError():
            return unavailable()
        case psycopg.DataError() if error.sqlstate is None:  # the driver refuses a NUL
            return Problem("invalid", "The request has a character that cannot be stored.")
    return Problem("internal", "The error was logged.")


async def _on_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return error.response()


async def _on_http(request: Request, error: Exception) -> Response:
    """The problem for a request that Starlette itself refuses."""
    assert isinstance(error, HTTPException)
    kinds = {404: "not-found", 405: "method-not-allowed", 406: "not-acceptable"}
    kind = kinds.get(error.status_code, "malformed")
    detail = f"{request.method} is not possible here." if kind == "method-not-allowed" else ""
    detail = detail or HTTPStatus(error.status_code).description or HTTPStatus(error.status_code).phrase
    return Problem(kind, detail, headers=error.headers).response()


async def _on_database(request: Request, error: Exception) -> Response:
    assert isinstance(error, psycopg.Error)
    problem = of_database(error)
    log.log(
        40 if problem.status == 500 else 30,
        "database_error",
        sqlstate=error.sqlstate,
        error=str(error),
        exc_info=error if problem.status == 500 else None,
    )
    return problem.response()


async def _on_bug(request: Request, error: Exception) -> Response:
    return Problem("internal", "The error was logged.").response()


HANDLERS: dict[Any, Any] = {
    Problem: _on_problem,
    HTTPException: _on_http,
    psycopg.Error: _on_database,
    Exception: _on_bug,
}
