"""Collects the parts of an agent's output that are kept when its turn ends."""

import re
from dataclasses import dataclass, field
from typing import Any

from outwake.session.events import (
    AgentEvent,
    Result,
    Started,
    Text,
    ToolCall,
    ToolResult,
    Unknown,
)
from outwake.worker.agents.base import AgentLine

LONGEST_TEXT = 20_000
"""Characters of the agent's last words that the prompt's result keeps. The messages have all of them."""
_CALLS = 10_000  # calls of tools that are followed
_SEEN = 200  # characters of the last words that a reason quotes
_SEARCHED = 64 * 1024  # characters at the end of a text in which an address is looked for

# A URL of bounded length, so that the search is linear; then the part that makes it a pull request's.
_URL = re.compile(r"https?://[^\s<>\"'`()\[\]{}/][^\s<>\"'`()\[\]{}]{0,500}")
_PULL_REQUEST = re.compile(r"/(?:pull|merge_requests|pull-requests|pulls)/[0-9]{1,20}")


@dataclass
class AgentSummary:
    """Follows a run, event by event.

    session: the agent's id of the conversation. line: the line that `result` was read from. results: how many
    there were. pull_request: the last address of a pull or merge request that the agent named.
    used: names of the tools of which a call succeeded. started: whether it announced a run, so that a result
    must follow. last: the end of what it said last. lingered: whether it was ended because it did not exit.
    """

    session: str | None = None
    result: Result | None = None
    line: AgentLine | None = None
    results: int = 0
    pull_request: str | None = None
    used: set[str] = field(default_factory=set)
    started: bool = False
    last: str = ""
    lingered: bool = False
    _calls: dict[str, str] = field(default_factory=dict, repr=False)

    def on_event(self, event: AgentEvent, line: AgentLine) -> None:
        match event:
            case Started(session=session):
                self.session = session or self.session
                self.started = True
            case Text(text, by):
                self.last = text[-_SEEN:]
                if by == "agent":
                    self.pull_request = pull_request(text) or self.pull_request
            case ToolCall(key, name):
                if len(self._calls) < _CALLS:
                    self._calls[key] = name
            case ToolResult(key, failed=failed):
                if (called := self._calls.pop(key, None)) is not None and not failed:
                    self.used.add(called)
            case Result():
                self.session = event.session or self.session
                self.result, self.line = event, line
                self.results += 1
                self.pull_request = pull_request(event.text) or self.pull_request
            case Unknown(name):
                self.last = name

    def as_json(self) -> dict[str, Any]:
        """The agent's part of prompt.result: the same fields for every kind of agent, and its own line."""
        result = self.result or Result()
        tokens = result.tokens
        counts = {
            "input": tokens.input,
            "output": tokens.output,
            "cache_read": tokens.cache_read,
            "cache_write": tokens.cache_write,
        }
        return {
            "text": result.text[:LONGEST_TEXT],
            "error": None if result.error is None else result.error[:LONGEST_TEXT],
            "cost": result.cost,
            "tokens": {kind: count for kind, count in counts.items() if count is not None},
            "denied": sorted(set(result.denied)),
            "agent": self.line,
            "pull_request": self.pull_request,
        }


def pull_request(text: str) -> str | None:
    """The last URL of a pull or merge request in a text. Only the end of a long text is searched."""
    found = None
    for url in _URL.finditer(text[-_SEARCHED:]):
        for match in _PULL_REQUEST.finditer(url.group()):
            found = url.group()[: match.end()]
    return found
