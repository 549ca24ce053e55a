"""JSON answers. The database makes most of them, and the API passes their text on unparsed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from starlette.responses import Response

Place = TypeVar("Place", str, int)


@dataclass(frozen=True)
class Page(Generic[Place]):
    """A page of a list. `items` are JSON texts. `next` tells where the next page begins, if there is one."""

    items: Sequence[str]
    next: Place | None


def json_response(text: str, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(text, status, headers, "application/json")
