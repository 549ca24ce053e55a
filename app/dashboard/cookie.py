"""Who looks at a page. Where tokens are required it is whom the token in a cookie stands for: a browser's
session is an API token, so that it is stored as its hash, listed and revoked like any other.

The cookie is Lax: Strict would not be sent with the redirect that comes back from the issuer. No form of
another site may use it (page.py), and the API does not know it.
"""

from starlette.requests import Request
from starlette.responses import Response

from outwake.app.auth.identity import Identity, unauthorized
from outwake.app.context import context

VALID_FOR = 8 * 3600  # seconds until one has to sign in anew


async def identify(request: Request) -> Identity:
    """Raises Problem (unauthorized, forbidden, unavailable, too-many-requests)."""
    here = context(request)
    token = token_of(request)
    if not here.settings.token_required:
        identity = await here.authenticator.identify(request)
    elif token is None:
        raise unauthorized("Sign in first.", None)
    else:
        identity = await here.authenticator.by_token(token)
    here.limits.admit(identity)
    return identity


def signed_in(request: Request) -> bool:
    """Whether there is a session to end."""
    return context(request).settings.token_required and token_of(request) is not None


def token_of(request: Request) -> str | None:
    return request.cookies.get(_name(request))


def keep(request: Request, response: Response, token: str) -> None:
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
    """Whether the browser speaks TLS, to us or to a proxy that OUTWAKE_PUBLIC_URL tells of."""
    return origin(request).startswith("https://")


def origin(request: Request) -> str:
    """Where the browser finds us."""
    given = context(request).settings.public_url
    return given or f"{request.url.scheme}://{request.headers.get('host', '')}"


def _name(request: Request) -> str:
    """With the prefix no other host can set it, but it takes TLS."""
    return "__Host-outwake" if is_secure(request) else "outwake"
