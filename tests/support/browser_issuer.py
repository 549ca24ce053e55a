"""An issuer that people sign in at: the stand-in of tests/support/issuer.py, with the endpoints of the
authorization code flow. It asks nobody: whoever comes is `user`.
"""

import base64
import hashlib
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from tests.support.http import listening
from tests.support.issuer import StandIn


class SignInIssuer(StandIn):
    """`claims_of` is what the next tokens say beyond the user; `denied` refuses instead."""

    def __init__(self) -> None:
        super().__init__()
        self.user = "alice"
        self.operator = False
        self.changes: dict[str, Any] = {}
        self.denied = False
        self.secret: str | None = None
        self._codes: dict[str, dict[str, str]] = {}
        self.app.router.routes += [
            Route("/authorize", self._authorize),
            Route("/token", self._token, methods=["POST"]),
        ]

    async def _authorize(self, request: Request) -> Response:
        asked = dict(request.query_params)
        assert asked["response_type"] == "code"
        assert asked["code_challenge_method"] == "S256"
        answer = {"state": asked["state"]}
        if self.denied:
            answer |= {"error": "access_denied", "error_description": "<b>not you</b>"}
        else:
            answer["code"] = secrets.token_urlsafe(16)
            self._codes[answer["code"]] = asked
        return RedirectResponse(f"{asked['redirect_uri']}?{urlencode(answer)}", 302)

    async def _token(self, request: Request) -> Response:
        form = dict(pair.split("=", 1) for pair in (await request.body()).decode().split("&"))
        asked = self._codes.pop(form.get("code", ""), None)
        digest = hashlib.sha256(form.get("code_verifier", "").encode()).digest()
        challenge = base64.urlsafe_b64encode(digest).decode().rstrip("=")
        if asked is None or challenge != asked["code_challenge"]:
            return JSONResponse({"error": "invalid_grant"}, 400)
        if self.secret is None:
            known = form.get("client_id") == asked["client_id"]
        else:
            basic = base64.b64encode(f"{asked['client_id']}:{self.secret}".encode()).decode()
            known = request.headers.get("authorization") == f"Basic {basic}"
        if not known:
            return JSONResponse({"error": "invalid_client"}, 401)
        token = self.token(self.user, operator=self.operator, **self.changes)
        return JSONResponse({"access_token": token, "token_type": "Bearer", "expires_in": 300})


@asynccontextmanager
async def sign_in_issuer() -> AsyncIterator[SignInIssuer]:
    """An issuer that answers until the block ends."""
    issuer = SignInIssuer()
    async with listening(issuer.app) as url:
        issuer.url = url
        issuer.document = {"authorization_endpoint": f"{url}/authorize", "token_endpoint": f"{url}/token"}
        yield issuer
