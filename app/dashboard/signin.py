"""Sign-in with a browser: at the OpenID Connect issuer, or with an API token.

The issuer's way is the authorization code flow with PKCE (RFC 7636; OAuth 2.1):
1. Redirect to the issuer with a random `state` and the hash of a random `code_verifier`. A cookie, sent only
   to the callback, keeps both. So a callback that this browser did not start is refused.
2. The callback gets a code. Exchange it, with the verifier, for an access token. Its signature, audience and
   roles are checked as for a request's token (app/auth/identity.py).
3. Create the browser's session: an API token in a cookie (cookie.py). Discard the issuer's token.
"""

import base64
import hashlib
import hmac
import secrets
from datetime import timedelta
from urllib.parse import quote, urlencode, urlsplit

import httpx
from starlette.requests import Request
from starlette.responses import Response

from outwake.app.api.problems import Problem, unavailable
from outwake.app.auth.identity import Identity
from outwake.app.auth.oidc import FETCH_TIMEOUT, Issuer, Unusable
from outwake.app.auth.oidc import ask as ask_issuer
from outwake.app.context import context
from outwake.app.dashboard import cookie
from outwake.app.dashboard.page import back, go, read_form, render
from outwake.schema import in_schema
from outwake.session.token import create, hash_of, is_token
from outwake.telemetry.log import get_logger

CALLBACK = "/ui/sign-in/callback"
PENDING = "outwake_sign_in"
PENDING_FOR = 600  # seconds that a sign-in at the issuer may take
NAME = "browser"

_FORGET_EXPIRED = in_schema(
    "DELETE FROM :schema.api_token WHERE user_id = %s AND name = %s AND expires_at < clock_timestamp()"
)
_REVOKE = in_schema(
    "UPDATE :schema.api_token SET revoked_at = clock_timestamp()"
    " WHERE hash = %s AND name = %s AND revoked_at IS NULL"
)

log = get_logger("outwake.app.dashboard.signin")


async def ask(request: Request, identity: Identity) -> Response:
    """The page that offers both ways."""
    return await _ask(request, identity)


async def _ask(request: Request, identity: Identity, wrong: str = "", status: int = 200) -> Response:
    here = context(request)
    target = back(request.query_params, "/")
    if not here.settings.token_required:
        return go(target)  # the development mode
    issuer = here.settings.oidc_issuer
    return await render(
        request,
        identity,
        "signin.html",
        status,
        issuer=urlsplit(issuer).netloc if issuer else None,
        start="/ui/sign-in/issuer?" + urlencode({"back": target}),
        back=target,
        wrong=wrong,
    )


async def by_token(request: Request, identity: Identity) -> Response:
    """Sign in with an API token. The cookie holds this token, so the session ends when the token does."""
    form = await read_form(request)
    token = form.get("token", "").strip()
    try:
        if not is_token(token):
            raise Problem("unauthorized", "That is no API token: they begin with outwake_.")
        await context(request).authenticator.by_token(token)
    except Problem as problem:
        if problem.kind != "unauthorized":
            raise
        return await _ask(request, identity, str(problem), 401)
    response = go(back(form, "/"))
    cookie.save(request, response, token)
    return response


async def go_to_issuer(request: Request, identity: Identity) -> Response:
    """Step 1."""
    settings = context(request).settings
    issuer = _issuer(request)
    state, verifier = secrets.token_urlsafe(32), secrets.token_urlsafe(48)
    challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=")
    query = {
        "response_type": "code",
        "client_id": settings.oidc_client_id,
        "redirect_uri": cookie.origin(request) + CALLBACK,
        "scope": "openid",
        "state": state,
        "code_challenge": challenge.decode(),
        "code_challenge_method": "S256",
    }
    url = await issuer.endpoint("authorization_endpoint")
    response = go(f"{url}{'&' if '?' in url else '?'}{urlencode(query)}")
    pending = "~".join((state, verifier, _pack(back(request.query_params, "/"))))
    response.set_cookie(
        PENDING,
        pending,
        max_age=PENDING_FOR,
        path=CALLBACK,
        secure=cookie.is_secure(request),
        httponly=True,
        samesite="lax",
    )
    return response


async def come_back(request: Request, identity: Identity) -> Response:
    """Steps 2 and 3."""
    here = context(request)
    state, _, rest = request.cookies.get(PENDING, "").partition("~")
    verifier, _, target = rest.partition("~")
    given = request.query_params.get("state", "")
    if not state or not hmac.compare_digest(state.encode(), given.encode("utf-8", "replace")):
        return await _ask(request, identity, "Signing in took too long, or began elsewhere: try again.", 401)
    code = request.query_params.get("code")
    if not code:
        why = request.query_params.get("error_description") or request.query_params.get("error")
        return await _ask(request, identity, f"The issuer refused: {why or 'without a word'}", 401)
    try:
        token = await _exchange(request, code, verifier)
        known = await here.authenticator.by_token(token)
    except Problem as problem:
        if problem.kind != "unauthorized":
            raise
        return await _ask(request, identity, str(problem), 401)
    async with here.database.connection() as conn:
        await conn.execute(_FORGET_EXPIRED, (known.user_id, NAME))
        valid_for = timedelta(seconds=cookie.VALID_FOR)
        _, session = await create(conn, known.user_id, NAME, operator=known.operator, valid_for=valid_for)
    response = go(back({"back": _unpack(target)}, "/"))
    cookie.save(request, response, session)
    response.delete_cookie(PENDING, path=CALLBACK, secure=cookie.is_secure(request), httponly=True)
    return response


async def _exchange(request: Request, code: str, verifier: str) -> str:
    """The access token. Raises Problem (unauthorized, unavailable)."""
    settings = context(request).settings
    form = {
        "grant_type": "authorization_code",
        "code": code,
        "redirect_uri": cookie.origin(request) + CALLBACK,
        "code_verifier": verifier,
    }
    auth = None
    if settings.oidc_client_secret:
        secret = settings.oidc_client_secret.get_secret_value()
        # RFC 6749, section 2.3.1: both are form-encoded first.
        auth = httpx.BasicAuth(quote(settings.oidc_client_id, safe=""), quote(secret, safe=""))
    else:
        form["client_id"] = settings.oidc_client_id
    url = await _issuer(request).endpoint("token_endpoint")
    try:
        async with httpx.AsyncClient(timeout=FETCH_TIMEOUT, auth=auth) as client:
            status, found = await ask_issuer(client, "POST", url, data=form)
    except (httpx.HTTPError, httpx.InvalidURL, Unusable):
        raise unavailable("The identity provider does not answer; try again.") from None
    token = found.get("access_token") if found else None
    if status != 200 or not isinstance(token, str) or is_token(token):
        why = str(found.get("error", ""))[:200] if found else ""
        log.warning("code_not_exchanged", status=status, error=why)
        raise Problem("unauthorized", f"The issuer did not accept the code: {why or status}.")
    return token


async def sign_out(request: Request, identity: Identity) -> Response:
    """End the session here, but not at the issuer. A pasted API token is not revoked: others may use it."""
    response = go("/ui/sign-in")
    token = cookie.token_of(request)
    if token is not None and is_token(token):
        await context(request).database.rows(_REVOKE, (hash_of(token), NAME))
    cookie.forget(request, response)
    return response


def _issuer(request: Request) -> Issuer:
    issuer = context(request).authenticator.issuer
    if issuer is None:
        raise Problem("not-found", "No issuer is configured.")
    return issuer


def _pack(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _unpack(text: str) -> str:
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode()
    except ValueError:
        return "/"
