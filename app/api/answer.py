"""JSON answers. The database makes most of them, and the API passes their text on unparsed."""

from collections.abc import Mapping

from starlette.responses import Response


def json_response(text: str, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(text, status, headers, "application/json")
