"""The OpenAPI 3.1 document, made from the table of routes and the models."""

import re
from functools import cache
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from outwake.app.api import models
from outwake.app.api.problems import KINDS, MEDIA_TYPE
from outwake.app.routes import ENDPOINTS, EVENTS, Endpoint

_REF = "#/components/schemas/{model}"

_HEADERS: dict[str, dict[str, Any]] = {
    "Idempotency-Key": {
        "description": "Repeat a request under its key and get the first answer, not a second session. "
        "A string in double quotes; without them it is the same key.",
        "schema": {"type": "string", "pattern": '^("[ !#-~]{1,255}"|[!#-~]{1,255})$'},
    },
    "traceparent": {
        "description": "W3C trace context; kept with the outbox row.",
        "schema": {"type": "string"},
    },
    "Last-Event-ID": {
        "description": "`id` of the last event the client has; an EventSource sends it by itself.",
        "schema": {"type": "string", "pattern": "^[0-9]{0,18}$"},
    },
    "Location": {"description": "The session.", "schema": {"type": "string"}},
    "Idempotent-Replayed": {
        "description": "`true`: this is the first answer under this key, given again.",
        "schema": {"type": "string", "const": "true"},
    },
    "WWW-Authenticate": {
        "description": "The challenge of RFC 6750; `error` says what is wrong with the token.",
        "schema": {"type": "string"},
    },
    "Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}},
    "Allow": {"description": "The methods of this path.", "schema": {"type": "string"}},
}

# The schema of one event of a stream; `data` is JSON.
_EVENT = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {"enum": ["message", "superseded", "status"]},
        "id": {"type": "string"},
        "data": {"type": "string"},
    },
}

_BEARER = {
    "type": "http",
    "scheme": "bearer",
    "description": "A token of the configured OpenID Connect issuer, or an API token (`outwake token "
    "create`). In development mode, on loopback only, none is needed.",
}


@cache
def document() -> dict[str, Any]:
    """The whole document."""
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in ENDPOINTS:
        path = re.sub(r":\w+}", "}", endpoint.path)
        paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint)
    return {
        "openapi": "3.1.1",
        "info": {
            "title": "Outwake",
            "version": version("outwake"),
            "summary": "Coding-agent sessions that are worked on once they are accepted.",
            "description": _problems_text(),
        },
        "paths": paths,
        "components": {"schemas": _schemas(), "securitySchemes": {"bearer": _BEARER}},
    }


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    responses = {
        str(status): _answer(endpoint, status, description, model)
        for status, (description, model) in endpoint.answers.items()
    }
    by_status: dict[int, list[str]] = {}
    for kind in endpoint.kinds:
        by_status.setdefault(KINDS[kind][0], []).append(kind)
    for status, kinds in by_status.items():
        responses[str(status)] = _problem(status, kinds)
    operation: dict[str, Any] = {
        "operationId": endpoint.handler.__name__,
        "summary": endpoint.summary,
        "tags": [endpoint.path.split("/")[1] if endpoint.access != "anybody" else "health"],
        "parameters": _parameters(endpoint),
        "responses": responses,
    }
    if endpoint.access != "anybody":
        operation["security"] = [{"bearer": []}]
    if endpoint.body:
        schema = {"$ref": _REF.format(model=endpoint.body.__name__)}
        content = {media_type: {"schema": schema} for media_type in endpoint.body_types}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _parameters(endpoint: Endpoint) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if match := re.search(r"{id:(\w+)}", endpoint.path):
        schema: dict[str, Any] = {"type": "string", "format": "uuid"}
        if match[1] == "int":
            schema = {"type": "integer", "format": "int64", "minimum": 1}
        found.append({"name": "id", "in": "path", "required": True, "schema": schema})
    if endpoint.query:
        for name, schema in endpoint.query.model_json_schema()["properties"].items():
            described = {"description": text} if (text := schema.pop("description", None)) else {}
            schema.pop("title", None)
            found.append({"name": name, "in": "query", **described, "schema": _without_null(schema)})
    for name in endpoint.request_headers:
        found.append({"name": name, "in": "header", **_HEADERS[name]})
    return found


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema without its null: a query cannot hold one, and a nullable parameter may be left out."""
    choices = schema.pop("anyOf", None)
    if choices is None:
        return schema
    if schema.get("default", 0) is None:
        del schema["default"]
    choices = [choice for choice in choices if choice != {"type": "null"}]
    return {**schema, **(choices[0] if len(choices) == 1 else {"anyOf": choices})}


def _answer(
    endpoint: Endpoint, status: int, description: str, model: type[BaseModel] | None
) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": description}
    if model:
        schema: dict[str, Any] = {"$ref": _REF.format(model=model.__name__)}
        answer["content"] = {endpoint.gives: {"schema": schema}}
    elif endpoint.gives == EVENTS and status == 200:
        answer["content"] = {EVENTS: {"schema": _EVENT}}
    if headers := endpoint.answer_headers.get(status):
        answer["headers"] = {name: _HEADERS[name] for name in headers}
    return answer


def _problem(status: int, kinds: list[str]) -> dict[str, Any]:
    types = [f"urn:outwake:problem:{kind}" for kind in kinds]
    schema = {
        "allOf": [
            {"$ref": _REF.format(model="ProblemDetails")},
            {"properties": {"type": {"enum": types}, "status": {"const": status}}},
        ]
    }
    answer: dict[str, Any] = {
        "description": " ".join(f"{KINDS[kind][1]}." for kind in kinds),
        "content": {MEDIA_TYPE: {"schema": schema}},
    }
    if name := {401: "WWW-Authenticate", 429: "Retry-After", 503: "Retry-After"}.get(status):
        answer["headers"] = {name: _HEADERS[name]}
    return answer


def _schemas() -> dict[str, Any]:
    used: set[type[BaseModel]] = {models.ProblemDetails, models.Message, models.SessionState}
    for endpoint in ENDPOINTS:
        used |= {model for _, model in endpoint.answers.values() if model}
        used |= {endpoint.body} if endpoint.body else set()
    ordered = sorted(used, key=lambda model: model.__name__)
    _, definitions = models_json_schema([(model, "validation") for model in ordered], ref_template=_REF)
    found: dict[str, Any] = definitions["$defs"]
    return found


def _problems_text() -> str:
    lines = [
        f"| `urn:outwake:problem:{kind}` | {status} | {title} |" for kind, (status, title) in KINDS.items()
    ]
    return "\n".join(
        [
            "Errors are problem details (RFC 9457):",
            "",
            "| type | status | title |",
            "|---|---|---|",
            *lines,
        ]
    )
