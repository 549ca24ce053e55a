"""The OpenAPI document is valid, and says what the table of routes says."""

import json

from openapi_spec_validator import OpenAPIV31SpecValidator

from outwake.app.api.openapi import document
from outwake.app.api.problems import KINDS
from outwake.app.routes import ENDPOINTS, routes


def test_document_is_valid() -> None:
    OpenAPIV31SpecValidator(json.loads(json.dumps(document()))).validate()


def test_every_route_is_in_the_document() -> None:
    served = {
        (route.path.replace(":uuid", "").replace(":int", ""), method.lower())
        for route in routes()
        for method in route.methods or ()
        if method != "HEAD"
    }
    documented = {(path, method) for path, methods in document()["paths"].items() for method in methods}
    assert documented == served


def test_operations_are_told_apart() -> None:
    names = [
        operation["operationId"] for methods in document()["paths"].values() for operation in methods.values()
    ]
    assert len(set(names)) == len(names) == len(ENDPOINTS)


def test_problems_are_known() -> None:
    for endpoint in ENDPOINTS:
        assert set(endpoint.kinds) <= set(KINDS)
