"""A stand-in of the allocator (docs/sandbox.md): a real HTTP server that lends what was submitted to it."""

import asyncio
import itertools
import json
import uuid
from typing import Any

from starlette.requests import Request

from tests.support.faults import Steps
from tests.support.loopback import Answer, Loopback, route


class Allocator:
    """Items are free, borrowed (by their token), or on their way back."""

    def __init__(self, steps: Steps) -> None:
        self.url = ""
        self.steps = steps
        self.free: list[Any] = []
        self.borrowed: dict[str, Any] = {}
        self.operations: dict[str, str] = {}
        self.asked: list[dict[str, Any]] = []
        """The params of each borrow."""
        self.return_status = "succeeded"
        """What operations of returning end with; anything but `succeeded` keeps the item borrowed."""
        self._changed = asyncio.Condition()
        self._numbers = itertools.count(1)

    async def submit(self, item: Any) -> None:
        async with self._changed:
            self.free.append(item)
            self._changed.notify_all()
        await self.steps.tell()

    async def borrow(self, request: Request) -> Answer:
        self.asked.append(json.loads(request.query_params.get("params", "{}")))
        wait = float(request.query_params.get("wait", 0))
        try:
            async with asyncio.timeout(wait), self._changed:
                await self._changed.wait_for(lambda: self.free)
                item = self.free.pop(0)
        except TimeoutError:
            return 503, {"err": "no_free_item", "msg": "nothing is free"}
        token = str(uuid.uuid4())
        self.borrowed[token] = item
        return 200, {"item": item, "borrow_token": token}

    async def give_back(self, request: Request) -> Answer:
        body = await request.json()
        token = body["borrow_token"]
        if self.borrowed.get(token) != body["item"]:
            return 409, {"err": "not_borrowed", "msg": "already returned, or the token is another's"}
        operation = f"op-{next(self._numbers)}"
        self.operations[operation] = self.return_status
        if self.return_status == "succeeded":
            await self.submit(self.borrowed.pop(token))
        return 200, {"operation_id": operation, "status": "pending"}

    async def operation(self, request: Request) -> Answer:
        name = request.path_params["id"]
        if name not in self.operations:
            return 404, {"err": "unknown_operation", "msg": name}
        return 200, {"operation_id": name, "status": self.operations[name], "message": ""}

    async def submitted(self, request: Request) -> Answer:
        await self.submit((await request.json())["item"])
        return 200, {"operation_id": f"op-{next(self._numbers)}", "status": "succeeded"}

    async def stats(self, request: Request) -> Answer:
        failed = sum(status == "failed" for status in self.operations.values())
        counts = {"free_count": len(self.free), "borrowed_count": len(self.borrowed)}
        return 200, {**counts, "pending_operations": 0, "failed_operations": failed}


def allocator(server: Loopback, steps: Steps) -> Allocator:
    """An allocator without items."""
    made = Allocator(steps)
    made.url = server.add(
        "allocator",
        [
            route(steps, "borrow", "/ip/borrow", "GET", made.borrow),
            route(steps, "return", "/ip/return", "POST", made.give_back),
            route(steps, "operation", "/ip/operations/{id}", "GET", made.operation),
            route(steps, "submit", "/ip/submit", "POST", made.submitted),
            route(steps, "stats", "/ip/admin/stats", "GET", made.stats),
        ],
    )
    return made
