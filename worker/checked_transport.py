"""An HTTP client for URLs from users. It connects only to allowed addresses.

1. The name is resolved here, once. If any of its addresses is not allowed, the request is refused.
2. The connection goes to a checked address, not to the name, so a changed DNS answer (rebinding) has no
   effect. The Host header and the certificate's expected name stay those of the URL.
3. Redirects are not followed, and proxies of the environment are not used: both would lead to unchecked
   addresses.
"""

import asyncio
import functools
import socket
from collections.abc import Awaitable, Callable
from ipaddress import ip_address

import httpx

from outwake.session.callback import Address, CallbackError, Network, check_address, check_callback, is_listed

Resolve = Callable[[str, int], Awaitable[list[Address]]]


class CallbackTransport(httpx.AsyncBaseTransport):
    """Sends to allowed addresses only. Raises CallbackError, httpx.ConnectError if there is no address."""

    def __init__(self, allowed: tuple[Network, ...], resolve: Resolve | None = None) -> None:
        self._allowed = allowed
        self._resolve = resolve or _resolve
        self._inner = httpx.AsyncHTTPTransport(verify=tls_context())

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        check_callback(str(url), self._allowed)
        host = url.raw_host.decode("ascii")
        addresses = await self._resolve(url.host, url.port or (443 if url.scheme == "https" else 80))
        if not addresses:
            raise httpx.ConnectError("the name has no address", request=request)
        for address in addresses:
            check_address(address, self._allowed)
            if url.scheme == "http" and not is_listed(address, self._allowed):
                raise CallbackError("plain http is for networks of OUTWAKE_WEBHOOK_ALLOW only")
        pinned = httpx.Request(
            request.method,
            url.copy_with(host=str(addresses[0])),
            headers=request.headers,  # including Host, which was made from the URL
            stream=request.stream,
            extensions={**request.extensions, "sni_hostname": host},
        )
        return await self._inner.handle_async_request(pinned)

    async def aclose(self) -> None:
        await self._inner.aclose()


# Loading the CA certificates takes longer than a delivery.
tls_context = functools.cache(httpx.create_ssl_context)


async def _resolve(host: str, port: int) -> list[Address]:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise httpx.ConnectError(f"the name cannot be resolved: {error}") from None
    return [ip_address(entry[4][0]) for entry in found]
