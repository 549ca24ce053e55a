"""Kind `allocator`: sandboxes with an HTTP API, lent by an allocator over HTTP (docs/sandbox.md).

The allocator has no request ids, so its answer to an earlier request can't be asked for again. A caller must
not give up before the answer comes; `worker/sandboxes/lending.py` ensures that.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from typing import Any

import httpx

from outwake.errors import HandBack
from outwake.telemetry import trace
from outwake.telemetry.log import get_logger
from outwake.worker.ask import NoAnswer, NotSent, ask
from outwake.worker.errors import OutcomeUnknown, PermanentError, TransientError
from outwake.worker.sandboxes.aio import AioSandbox
from outwake.worker.sandboxes.base import Item, Request, StepError

_NONE_FREE = (404, 503)
_MARGIN = 30.0
"""Seconds beyond `wait` after which we assume that the allocator will never answer."""
_ANSWER = 30.0  # seconds for any other answer
_ITEM = 1 << 20  # bytes of an answer with an item, which is stored with the session
_SWEEP_TIMEOUT = 20.0
_SWEEP = 'rm -rf "$HOME/outwake"'
_LOOKS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_RETURNED = re.compile(r"already|returned|not borrowed|borrow.?token|unknown item", re.IGNORECASE)

log = get_logger(__name__)


class AllocatorProvider:
    """The allocator at `url`.

    wait: seconds that it may wait for a free sandbox. keep: seconds that a turn's sandbox is kept for the
    next turn.
    """

    kind = "allocator"

    def __init__(self, url: str, wait: float, keep: float) -> None:
        self._url = url.rstrip("/")
        self._wait = wait
        self._keep = keep

    async def acquire(self, request: Request) -> Item:
        """Borrow a sandbox; wait up to `OUTWAKE_BORROW_WAIT` for one.

        Raises HandBack if no sandbox is free, TransientError or PermanentError if the allocator certainly
        lent us none, OutcomeUnknown if it may have lent one: no answer, or an answer that is not the
        allocator's.
        """
        about = {
            "borrow_id": str(request.intent),
            "session_id": str(request.session_id),
            "run": str(request.run),
            "attempt": request.attempt,
        }
        query: dict[str, str | float] = {"params": json.dumps(about)}
        if self._wait:
            query["wait"] = self._wait
        try:
            async with self._client() as client:
                status, _, answer = await ask(
                    client, "GET", "/ip/borrow", query=query, seconds=self._wait + _MARGIN, limit=_ITEM
                )
        except NotSent as error:
            raise TransientError(f"the allocator can't be reached: {error}") from error
        except NoAnswer as error:
            raise OutcomeUnknown(f"the allocator did not answer: {error}") from error
        if 200 <= status < 300:
            if not isinstance(answer, dict) or "item" not in answer:
                raise OutcomeUnknown("the allocator answered 200 without item and borrow_token")
            return self._held(answer["item"], answer.get("borrow_token"))
        if not isinstance(answer, dict) or "err" not in answer:
            raise OutcomeUnknown(f"status {status}, which is no answer of the allocator's")
        if status in _NONE_FREE:
            raise HandBack("no sandbox is free", timedelta(seconds=max(1.0, self._wait / 2)))
        kind = PermanentError if status in (400, 422) else TransientError
        raise kind(f"the allocator refused with status {status}: {_said(answer)}")

    def _held(self, item: Any, token: Any) -> Item:
        if not isinstance(token, str):
            raise OutcomeUnknown("the allocator answered 200 without item and borrow_token")
        keep = {"keep": self._keep} if self._keep else {}
        return {"kind": self.kind, "item": item, "borrow_token": token, **keep}

    @asynccontextmanager
    async def connect(self, held: Item) -> AsyncIterator[AioSandbox]:
        """Connect to the sandbox that the item names."""
        async with AioSandbox.connect(held.get("item")) as sandbox:
            yield sandbox

    async def release(self, held: Item) -> None:
        """Sweep the sandbox and return it. A second return does no harm.

        Raises TransientError if the allocator did not accept the return.
        """
        await self._sweep(held)
        body = {"item": held.get("item"), "borrow_token": held.get("borrow_token")}
        try:
            async with self._client() as client:
                status, _, answer = await ask(client, "POST", "/ip/return", body=body, seconds=_ANSWER)
                if 200 <= status < 300 and isinstance(answer, dict):
                    await self._follow(client, answer)
                    return
        except NoAnswer as error:
            raise TransientError(f"the allocator can't be reached: {error}") from error
        said = _said(answer)
        if 400 <= status < 500 and _RETURNED.search(said):
            log.info("sandbox_was_returned", status=status, said=said)
            return
        raise TransientError(f"the allocator refused the return with status {status}: {said}")

    async def _sweep(self, held: Item) -> None:
        """Remove our files from the sandbox. A broken sandbox is returned all the same."""
        with suppress(TransientError, PermanentError, StepError, TimeoutError):
            async with asyncio.timeout(_SWEEP_TIMEOUT), self.connect(held) as sandbox:
                await sandbox.run("sweep the sandbox", _SWEEP)

    async def _follow(self, client: httpx.AsyncClient, answer: dict[str, Any]) -> None:
        """Check the progress of a return in the background. The allocator must finish one that takes long."""
        operation, status = answer.get("operation_id"), answer.get("status")
        for pause in _LOOKS:
            if operation is None or status == "succeeded":
                return
            if status == "failed":
                raise TransientError(f"the allocator's return failed: {_said(answer)}")
            await asyncio.sleep(pause)
            told = (await ask(client, "GET", f"/ip/operations/{operation}", seconds=_ANSWER)).json
            answer = told if isinstance(told, dict) else {}
            status = answer.get("status", status)

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self._url, headers=trace.headers(), trust_env=False)


def _said(answer: Any) -> str:
    if not isinstance(answer, dict):
        return ""
    parts = (answer.get("err"), answer.get("msg"), answer.get("message"))
    return ": ".join(part[:500] for part in parts if isinstance(part, str) and part)[:500]
