"""The browser's sign-in cookie, and the identity of a page's user.

If tokens are required, the cookie holds an API token, which is stored as a hash, listed and revoked like any
other.

The cookie is SameSite=Lax, because a Strict cookie is not sent with the redirect from the issuer. Forms of
other sites cannot use it (page.py), and the API does not accept it.
"""

from starlette.requests import Request
from starlette.responses import Response

from outwake.app.auth.identity import Identity, unauthorized
from outwake.app.auth.limits import admit
from outwake.app.context import context

VALID_FOR = 8 * 3600  # seconds until a user must sign in again


async def identify(request: Request) -> Identity:
    """The page's user. Raises Problem (unauthorized, forbidden, unavailable, too-many-requests)."""
    here = context(request)
    token = token_of(request)
    if not here.settings.token_required:
        identity = await here.authenticator.identify(request)
    elif token is None:
        raise unauthorized("Sign in first.", None)
    else:
        identity = await here.authenticator.by_token(token)
    admit(request, here.limits, identity)
    return identity


def signed_in(request: Request) -> bool:
    """Whether there is a session to end."""
    return context(request).settings.token_required and token_of(request) is not None


def token_of(request: Request) -> str | None:
    return request.cookies.get(_name(request))


def save(request: Request, response: Response, token: str) -> None:
    response.set_cookie(
        _name(request),
        token,
        max_age=VALID_FOR,
        path="/",
        secure=is_secure(request),
        httponly=True,
        samesite="lax",
    )


def forget(request: Request, response: Response) -> None:
    response.delete_cookie(_name(request), path="/", secure=is_secure(request), httponly=True, samesite="lax")


def is_secure(request: Request) -> bool:
    """Whether the browser uses TLS, to us or to the proxy of OUTWAKE_PUBLIC_URL."""
    return origin(request).startswith("https://")


def origin(request: Request) -> str:
    """This server's origin as the browser sees it."""
    given = context(request).settings.public_url
    return given or f"{request.url.scheme}://{request.headers.get('host', '')}"


def _name(request: Request) -> str:
    """The cookie's name. With the prefix `__Host-` no other host can set it, but the prefix needs TLS."""
    return "__Host-outwake" if is_secure(request) else "outwake"
