"""The API process: the Starlette application, served by uvicorn."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware

from outwake.app import dashboard
from outwake.app.access_log import Access
from outwake.app.api import problems, reference
from outwake.app.auth.identity import Authenticator, check_host
from outwake.app.auth.limits import Limits
from outwake.app.auth.oidc import check_issuer
from outwake.app.connections import limited
from outwake.app.context import Context
from outwake.app.database import Database
from outwake.app.live.hub import Hub
from outwake.app.live.presence import WorkerPresence
from outwake.app.routes import routes
from outwake.app.tracing import Tracing
from outwake.errors import ConfigurationError
from outwake.lean import collect_seldom
from outwake.settings import Settings
from outwake.telemetry import trace
from outwake.telemetry.log import configure, get_logger, hide
from outwake.telemetry.stuck import StuckWatch

SHUTDOWN_TIMEOUT = 20  # seconds for open requests; no statement takes longer
STALL_TIMEOUT = 30  # seconds until a client that does not receive its data is disconnected
BACKLOG = 2048
_SIGNALS = (signal.SIGTERM, signal.SIGINT)

log = get_logger("outwake.app.main")


def create_app(settings: Settings) -> Starlette:
    """The application. Its lifespan opens the pool and the LISTEN connection, but does not wait for Postgres.
    Until Postgres answers, requests get 503.

    Raises ConfigurationError if the settings would open it to strangers, or if the issuer's URL is invalid.
    """
    check_host(settings)
    check_issuer(settings)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        database = Database(settings)
        hub = Hub(database, settings.listen_url)
        stuck = StuckWatch(settings, database.connection)
        authenticator = Authenticator(settings, database)
        app.state.context = Context(
            settings, database, WorkerPresence(database), hub, stuck, authenticator, Limits(settings)
        )
        await database.open()
        stuck.work_came()  # work may have come before the start
        running = asyncio.create_task(hub.run())
        running.add_done_callback(_end_with_the_hub)
        try:
            yield
        finally:
            hub.close()
            await stuck.close()
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
            await authenticator.close()
            await database.close()

    app = Starlette(
        routes=[*routes(), *reference.routes(), *dashboard.routes()],
        middleware=[Middleware(Tracing), Middleware(Access)],
        exception_handlers=problems.HANDLERS,
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


def _end_with_the_hub(running: asyncio.Task[None]) -> None:
    """Without the hub no stream shows anything. End the process, so that it is restarted."""
    if not running.cancelled() and (error := running.exception()):
        log.critical("hub_failed", exc_info=error)
        signal.raise_signal(signal.SIGTERM)


class Server(uvicorn.Server):
    """Ends the streams first, because uvicorn waits for open responses before it ends the lifespan."""

    def __init__(self, app: Starlette, settings: Settings) -> None:
        self._app = app
        config = uvicorn.Config(
            app,
            loop="uvloop" if os.name == "posix" else "asyncio",
            http=limited(settings),
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=SHUTDOWN_TIMEOUT,
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening in sockets or []:
            host, port = listening.getsockname()[:2]
            log.info("api_ready", host=host, port=port, pid=os.getpid())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        log.info("api_stopping")
        self._app.state.context.hub.close()
        await super().shutdown(sockets)


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Then end streams, finish open requests, and return.

    Logs `api_ready` with host and port when it accepts connections.

    Raises ConfigurationError if the host is not allowed or the address is not available.
    """
    configure(level=settings.log_level)
    hide(settings.secrets)
    trace.configure("outwake-api")
    app = create_app(settings)
    with bind(settings.host, settings.port) as listening:
        server = Server(app, settings)
        # Before uvicorn installs its handlers, a signal aborts the start. After its shutdown uvicorn raises
        # the signal again; the handler then does nothing, because that is a normal end.
        previous = {number: signal.signal(number, server.handle_exit) for number in _SIGNALS}
        if not settings.token_required:
            everybody = "whoever can connect" if settings.dev_identity else "every user of this machine"
            warning = f"no authentication: {everybody} is operator"
            log.warning("dev_identity", host=settings.host, warning=warning)
        collect_seldom()
        try:
            server.run([listening])
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            trace.shutdown()
    log.info("api_stopped")


def bind(host: str, port: int) -> socket.socket:
    """The listening socket. Connections inherit its options, by which the kernel disconnects a client that
    receives nothing or has disappeared. Port 0 means any free port.

    Raises ConfigurationError.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALL_TIMEOUT * 1000)
            listening.bind(address)
            listening.listen(BACKLOG)
        except BaseException:
            listening.close()
            raise
    except OSError as error:
        raise ConfigurationError(
            f"OUTWAKE_HOST, OUTWAKE_PORT: cannot listen on {host} port {port}: {error.strerror}"
        ) from None
    return listening
