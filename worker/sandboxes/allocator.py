"""The allocator of sandboxes, over HTTP (docs/sandbox.md).

The allocator has no request ids, so its answer to an earlier request can't be asked for again. A caller must
not give up before the answer comes; `worker/sandboxes/lending.py` ensures that.
"""

import asyncio
import json
import re
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx

from outwake.errors import HandBack
from outwake.settings import Settings
from outwake.telemetry import trace
from outwake.telemetry.log import get_logger
from outwake.worker.errors import PermanentError, TransientError, Unclear
from outwake.worker.repo.remote import sweep
from outwake.worker.sandboxes.aio import Sandbox as Client
from outwake.worker.sandboxes.directory import Allocator, LocalAllocator, Sandbox

_NONE_FREE = (404, 503)
_MARGIN = 30.0
"""Seconds beyond `wait` after which we assume that the allocator will never answer."""
_TIMEOUT = httpx.Timeout(30.0, connect=10.0)
_SWEEP_TIMEOUT = 20.0
_LOOKS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_RETURNED = re.compile(r"already|returned|not borrowed|borrow.?token|unknown item", re.IGNORECASE)

log = get_logger(__name__)


class HttpAllocator:
    """The allocator at IP_ALLOCATOR_URL."""

    def __init__(self, settings: Settings) -> None:
        assert settings.ip_allocator_url is not None
        self._url = settings.ip_allocator_url.rstrip("/")
        self._wait = settings.borrow_wait
        self._keep = settings.sandbox_keep

    async def borrow(self, intent: UUID, session_id: UUID, run: UUID, attempt: int) -> Sandbox:
        """Borrow a sandbox; wait up to `OUTWAKE_BORROW_WAIT` for one.

        The ids are sent along for readers of the allocator's log.

        Raises HandBack if no sandbox is free, TransientError or PermanentError if the allocator certainly
        lent us none, Unclear if it may have lent one: no answer, or an answer that is not the allocator's.
        """
        about = {"borrow_id": str(intent), "session_id": str(session_id), "run": str(run), "attempt": attempt}
        query: dict[str, str | float] = {"params": json.dumps(about)}
        if self._wait:
            query["wait"] = self._wait
        try:
            async with self._client() as client:
                limit = httpx.Timeout(self._wait + _MARGIN, connect=10.0)
                response = await client.get("/ip/borrow", params=query, timeout=limit)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:  # the request was not even sent
            raise TransientError(f"the allocator can't be reached: {type(error).__name__}") from error
        except httpx.HTTPError as error:
            raise Unclear(f"the allocator did not answer: {type(error).__name__}") from error
        answer = _object(response)
        if response.is_success:
            if answer is None or "item" not in answer or not isinstance(answer.get("borrow_token"), str):
                raise Unclear("the allocator answered 200 without item and borrow_token")
            keep = {"keep": self._keep} if self._keep else {}
            return {"item": answer["item"], "borrow_token": answer["borrow_token"], **keep}
        if answer is None or "err" not in answer:
            raise Unclear(f"status {response.status_code}, which is no answer of the allocator's")
        if response.status_code in _NONE_FREE:
            raise HandBack("no sandbox is free", timedelta(seconds=max(1.0, self._wait / 2)))
        kind = PermanentError if response.status_code in (400, 422) else TransientError
        raise kind(f"the allocator refused with status {response.status_code}: {_said(answer)}")

    async def give_back(self, sandbox: Sandbox) -> None:
        """Sweep the sandbox and return it. A second return does no harm.

        Raises TransientError if the allocator did not accept the return.
        """
        await self._sweep(sandbox)
        body = {"item": sandbox["item"], "borrow_token": sandbox["borrow_token"]}
        try:
            async with self._client() as client:
                response = await client.post("/ip/return", json=body)
                answer = _object(response)
                if response.is_success and answer is not None:
                    await self._follow(client, answer)
                    return
        except httpx.HTTPError as error:
            raise TransientError(f"the allocator can't be reached: {type(error).__name__}") from error
        if response.is_client_error and answer is not None and _RETURNED.search(_said(answer)):
            log.info("sandbox_was_returned", status=response.status_code, said=_said(answer))
            return
        raise TransientError(
            f"the allocator refused the return with status {response.status_code}: {_said(answer or {})}"
        )

    async def _sweep(self, sandbox: Sandbox) -> None:
        """Remove our files from the sandbox. A broken sandbox is returned all the same."""
        with suppress(TransientError, PermanentError, TimeoutError):
            async with asyncio.timeout(_SWEEP_TIMEOUT), Client.connect(sandbox["item"]) as client:
                await sweep(client)

    async def _follow(self, client: httpx.AsyncClient, answer: dict[str, Any]) -> None:
        """Check the progress of a return in the background. The allocator must finish one that takes long."""
        operation, status = answer.get("operation_id"), answer.get("status")
        for pause in _LOOKS:
            if operation is None or status == "succeeded":
                return
            if status == "failed":
                raise TransientError(f"the allocator's return failed: {_said(answer)}")
            await asyncio.sleep(pause)
            response = await client.get(f"/ip/operations/{operation}")
            answer = _object(response) or {}
            status = answer.get("status", status)

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self._url, headers=trace.headers(), timeout=_TIMEOUT, trust_env=False
        )


def allocator(settings: Settings) -> Allocator:
    """The configured allocator: IP_ALLOCATOR_URL's, else this host's directories."""
    if settings.ip_allocator_url is not None:
        return HttpAllocator(settings)
    return LocalAllocator(Path(settings.workspace_root))


def _object(response: httpx.Response) -> dict[str, Any] | None:
    with suppress(ValueError):
        answer = response.json()
        if isinstance(answer, dict):
            return answer
    return None


def _said(answer: dict[str, Any]) -> str:
    parts = (answer.get("err"), answer.get("msg"), answer.get("message"))
    return ": ".join(str(part) for part in parts if part)[:500]
