"""A stand-in of the Anthropic Messages API: streams what a script says, as server-sent events."""

import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.support.faults import Dropped, Steps
from tests.support.loopback import Loopback, forgotten

Block = dict[str, Any]
Script = Callable[[dict[str, Any]], list[Block]]
"""What to answer to a request's body: content blocks."""

USAGE = {"input_tokens": 10, "output_tokens": 20}


def text(said: str) -> Block:
    return {"type": "text", "text": said}


def tool(name: str, identity: str, **given: Any) -> Block:
    return {"type": "tool_use", "id": identity, "name": name, "input": given}


def one_call(command: str, last_words: str) -> Script:
    """Run one command through the first MCP tool, then end the turn."""

    def script(body: dict[str, Any]) -> list[Block]:
        content = body["messages"][-1]["content"]
        answered = isinstance(content, list) and any(part.get("type") == "tool_result" for part in content)
        if answered:
            return [text(last_words)]
        name = next(entry["name"] for entry in body["tools"] if entry["name"].startswith("mcp__"))
        identity = f"toolu_{len(body['messages'])}"
        return [text("I use the sandbox's shell."), tool(name, identity, command=command)]

    return script


class Anthropic:
    """What was asked, and by which script it is answered."""

    def __init__(self, steps: Steps) -> None:
        self.url = ""
        self.script: Script = lambda _: [text("Hello.")]
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self._steps = steps

    async def messages(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        self.keys.add(request.headers.get("x-api-key", ""))
        try:
            answer = await self._steps.meet("messages")
        except Dropped:
            return await forgotten(request)
        if answer is not None:
            return JSONResponse(answer[1], answer[0])
        events = list(_events(self.script(body), body["model"]))
        return StreamingResponse(_stream(events), media_type="text/event-stream")


async def _stream(events: list[dict[str, Any]]) -> AsyncIterator[str]:
    for event in events:
        yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"


def _events(blocks: list[Block], model: str) -> Iterator[dict[str, Any]]:
    message = {"id": "msg_standin", "type": "message", "role": "assistant", "model": model, "content": []}
    ends = {"stop_reason": None, "stop_sequence": None, "usage": {**USAGE, "output_tokens": 1}}
    yield {"type": "message_start", "message": {**message, **ends}}
    for index, block in enumerate(blocks):
        if block["type"] == "text":
            start: Block = {**block, "text": ""}
            delta: Block = {"type": "text_delta", "text": block["text"]}
        else:
            start = {**block, "input": {}}
            delta = {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}
        yield {"type": "content_block_start", "index": index, "content_block": start}
        yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    reason = "tool_use" if blocks[-1]["type"] == "tool_use" else "end_turn"
    yield {"type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": None}, "usage": USAGE}
    yield {"type": "message_stop"}


def anthropic(server: Loopback, steps: Steps) -> Anthropic:
    """A Messages API; its script can be changed at any time."""
    made = Anthropic(steps)

    async def nothing(request: Request) -> Response:
        return JSONResponse({}, 404)

    made.url = server.add(
        "anthropic",
        [
            Route("/v1/messages", made.messages, methods=["POST"]),
            Route("/{rest:path}", nothing, methods=["GET", "HEAD", "POST"]),
        ],
    )
    return made
