"""A stand-in of GitHub's REST API for the pull requests of repositories, on loopback.

Each request, and each true answer, is held against tests/support/github_pulls.json, which is taken from
GitHub's published description of its API and says its source. `wrong` lists what did not fit.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.support.faults import Dropped, Steps
from tests.support.loopback import Loopback, forgotten

PUBLISHED: dict[str, Any] = json.loads(Path(__file__).with_name("github_pulls.json").read_text())
COMMIT = "6dcb09b5b57875f334f61aebed695e2e4193db5e"
DOCS = "https://docs.github.com/rest"


class GitHub:
    """The pull requests of all repositories; every branch but those of `missing` is there.

    Requests meet `steps` as `list` and `open`. `answers` replaces true answers, by that name, in order.
    """

    def __init__(self, steps: Steps, token: str) -> None:
        self.url = ""
        self.token = token
        self.pulls: list[dict[str, Any]] = []
        self.opened: list[dict[str, Any]] = []
        self.answers: dict[str, list[Response]] = {"list": [], "open": []}
        self.missing: set[str] = set()
        self.drafts = True
        self.wrong: list[str] = []
        self.steps = steps

    async def endpoint(self, request: Request) -> Response:
        name = "list" if request.method == "GET" else "open"
        try:
            await self.steps.meet(name)
            answer = await self._answer(name, request)
            await self.steps.meet(f"{name} done")
        except Dropped:
            return await forgotten(request)
        return answer

    async def _answer(self, name: str, request: Request) -> Response:
        self._check_head(request)
        if self.answers[name]:
            return self.answers[name].pop(0)
        if request.headers.get("authorization") != f"Bearer {self.token}":
            return self._said(401, "refused", {"message": "Bad credentials", "documentation_url": DOCS})
        owner = request.path_params["owner"]
        if name == "list":
            return self._said(200, "listed", self._listed(dict(request.query_params)))
        body = await request.json()
        self._check("request", body)
        return self._open(owner, f"{owner}/{request.path_params['repo']}", body)

    def _listed(self, query: dict[str, str]) -> list[dict[str, Any]]:
        for parameter, value in query.items():
            schema = PUBLISHED["query"].get(parameter)
            if schema is None or value not in schema.get("enum", [value]):
                self.wrong.append(f"the parameter {parameter}={value}")
        wanted = {"head": query.get("head"), "base": query.get("base"), "state": query.get("state", "open")}
        return [
            pull
            for pull in self.pulls
            if wanted["head"] in (None, pull["head"]["label"])
            and wanted["base"] in (None, pull["base"]["ref"])
            and wanted["state"] in ("all", pull["state"])
        ]

    def _open(self, owner: str, repo: str, body: dict[str, Any]) -> Response:
        self.opened.append(body)
        label = f"{owner}:{body['head']}"
        for field in ("head", "base"):
            if body[field] in self.missing:
                return self._invalid({"resource": "PullRequest", "field": field, "code": "invalid"})
        if body.get("draft") and not self.drafts:
            return self._invalid(_custom("Draft pull requests are not supported in this repository."))
        if self._listed({"head": label, "base": body["base"]}):
            return self._invalid(_custom(f"A pull request already exists for {label}."))
        number = len(self.pulls) + 7
        pull = {
            "number": number,
            "html_url": f"https://github.test/{repo}/pull/{number}",
            "state": "open",
            "draft": body.get("draft", False),
            "title": body["title"],
            "head": {"label": label, "ref": body["head"], "sha": COMMIT},
            "base": {"label": f"{owner}:{body['base']}", "ref": body["base"], "sha": COMMIT},
        }
        self.pulls.append(pull)
        return self._said(201, "created", pull)

    def _invalid(self, error: dict[str, str]) -> Response:
        body = {"message": "Validation Failed", "errors": [error], "documentation_url": DOCS}
        return self._said(422, "invalid", body)

    def _said(self, status: int, schema: str, body: Any) -> Response:
        self._check(schema, body)
        return JSONResponse(body, status)

    def _check(self, schema: str, body: Any) -> None:
        try:
            jsonschema.validate(body, PUBLISHED[schema])
        except jsonschema.ValidationError as error:
            self.wrong.append(f"{schema}: {error.message}")
        if schema == "request" and (unknown := body.keys() - PUBLISHED["request"]["properties"].keys()):
            self.wrong.append(f"the request's {unknown}")

    def _check_head(self, request: Request) -> None:
        expected = {"accept": "application/vnd.github+json", "x-github-api-version": "2022-11-28"}
        for header, value in expected.items():
            if request.headers.get(header) != value:
                self.wrong.append(f"the header {header}")
        if not request.headers.get("user-agent"):
            self.wrong.append("no User-Agent, which GitHub refuses")


def _custom(message: str) -> dict[str, str]:
    return {"resource": "PullRequest", "code": "custom", "message": message}


@contextmanager
def github(server: Loopback, steps: Steps, token: str) -> Iterator[GitHub]:
    """The API below a path of its own. Fails at the end if a request or an answer was not as published."""
    made = GitHub(steps, token)
    path = "/repos/{owner}/{repo}/pulls"
    made.url = server.add("github", [Route(path, made.endpoint, methods=["GET", "POST"])])
    yield made
    assert made.wrong == []
