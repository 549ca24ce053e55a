"""A Git repository over HTTPS that lets in only who knows its password: git's own http-backend, and TLS."""

import asyncio
import base64
import os
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

BACKEND = Path(
    subprocess.run(["git", "--exec-path"], capture_output=True, check=True, text=True).stdout.strip(),
    "git-http-backend",
)


@asynccontextmanager
async def git_server(root: Path, user: str, password: str) -> AsyncIterator[tuple[str, Path]]:
    """Serve the bare repositories below `root`; the URL, and the certificate to trust.

    Below /moved/ is a redirect to each, and below /refused/ a refusal in words.
    """
    certificate = await asyncio.to_thread(_make_certificate, root)
    expected = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()

    async def endpoint(request: Request) -> Response:
        path = request.path_params["path"]
        if path.startswith("moved/"):
            return RedirectResponse(f"/{path.removeprefix('moved/')}?{request.url.query}")
        if path.startswith("refused/"):
            return PlainTextResponse("vault token s.INTERNAL-SECRET", 403)
        if request.headers.get("authorization") != expected:
            return Response(status_code=401, headers={"WWW-Authenticate": 'Basic realm="git"'})
        return await _call(root, request)

    app = Starlette(routes=[Route("/{path:path}", endpoint, methods=["GET", "POST"])])
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app,
        log_config=None,
        lifespan="off",
        ssl_certfile=certificate,
        ssl_keyfile=certificate.with_suffix(".key"),
    )
    config.load()
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve([listening]))
    try:
        yield f"https://127.0.0.1:{listening.getsockname()[1]}", certificate
    finally:
        server.should_exit = True
        await task


async def _call(root: Path, request: Request) -> Response:
    """Run the backend as CGI."""
    told = {
        f"HTTP_{name.upper().replace('-', '_')}": request.headers[name]
        for name in ("content-encoding", "git-protocol")
        if name in request.headers
    }
    process = await asyncio.create_subprocess_exec(
        BACKEND,
        env={
            **told,
            "PATH": os.environ["PATH"],
            "GIT_PROJECT_ROOT": str(root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "REQUEST_METHOD": request.method,
            "PATH_INFO": request.url.path,
            "QUERY_STRING": request.url.query,
            "CONTENT_TYPE": request.headers.get("content-type", ""),
            "REMOTE_USER": "somebody",
        },
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate(await request.body())
    head, _, body = output.partition(b"\r\n\r\n")
    fields: dict[str, str] = {}
    for line in head.decode().split("\r\n"):
        name, _, value = line.partition(": ")
        fields[name] = value
    status = int(fields.pop("Status", "200").split(" ")[0])
    return Response(body, status, fields)


def _make_certificate(root: Path) -> Path:
    path = root / "server.pem"
    subprocess.run(
        [
            *(
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-days",
                "2",
                "-subj",
                "/CN=git.test",
            ),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", path.with_suffix(".key"), "-out", path),
        ],
        check=True,
        capture_output=True,
    )
    return path
