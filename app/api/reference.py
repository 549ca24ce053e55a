"""/openapi.json, and /docs, where Swagger UI renders it. The page loads nothing from another host.

The package offapi has Swagger UI's files. It is not imported, because an import loads all its templates.
"""

import json
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import Route

from outwake.app.api.answer import json_response
from outwake.app.api.body import check_accept
from outwake.app.api.openapi import document
from outwake.app.api.problems import Problem

# Swagger UI uses inline styles, and data: URLs for its icons.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Outwake: HTTP API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/docs/swagger.css">
<div id="swagger-ui"></div>
<noscript>This page needs JavaScript; <a href="/openapi.json">/openapi.json</a> says the same.</noscript>
<script src="/docs/swagger.js"></script>
<script src="/docs/start.js"></script>
"""

# Without `validatorUrl: null` Swagger UI asks a remote service to validate the document.
_START = """SwaggerUIBundle({
  url: "/openapi.json", dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null,
});
"""

_ASSETS = {
    "swagger.css": ("offapi/swagger_style.css", "text/css"),
    "swagger.js": ("offapi/swagger_bundle.js", "text/javascript"),
}


async def openapi(request: Request) -> Response:
    request.state.route = "/openapi.json"
    check_accept(request, "application/json")
    return json_response(_document(), headers={"Cache-Control": "no-cache"})


@cache
def _document() -> str:
    """Anybody may ask for it, as often as he likes."""
    return json.dumps(document())


async def docs(request: Request) -> Response:
    request.state.route = "/docs"
    check_accept(request, "text/html")
    return HTMLResponse(_PAGE, headers={"Content-Security-Policy": POLICY})


async def asset(request: Request) -> Response:
    request.state.route = "/docs/{asset}"
    name = request.path_params["asset"]
    if name == "start.js":
        return Response(_START, media_type="text/javascript")
    if name not in _ASSETS:
        raise Problem("not-found", "There is no such file.")
    path, media_type = _ASSETS[name]
    return FileResponse(_located(path), media_type=media_type, headers={"Cache-Control": "max-age=3600"})


@cache
def _located(path: str) -> Path:
    return Path(str(distribution("offapi").locate_file(path)))


def routes() -> list[Route]:
    return [
        Route("/openapi.json", openapi),
        Route("/docs", docs),
        Route("/docs/{asset}", asset),
    ]
