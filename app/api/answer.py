"""Answers. The database makes most of the JSON; it is passed on without being read."""

from collections.abc import Mapping

from starlette.responses import Response


def json_response(text: str, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(text, status, headers, "application/json")
