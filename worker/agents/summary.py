"""What of an agent's output is kept when its turn ends."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from outwake.session.events import AgentEvent, Result, Started, Text
from outwake.worker.agents.base import Line

LONGEST_TEXT = 20_000
"""Characters of the agent's last words that the prompt's result keeps. The messages have all of them."""
_SEARCHED = 64 * 1024  # characters at the end of a text in which an address is looked for

# A URL of bounded length, so that the search is linear; then the part that makes it a pull request's.
_URL = re.compile(r"https?://[^\s<>\"'`()\[\]{}/][^\s<>\"'`()\[\]{}]{0,500}")
_PULL_REQUEST = re.compile(r"/(?:pull|merge_requests|pull-requests|pulls)/[0-9]{1,20}")


@dataclass
class AgentSummary:
    """Follows a run, event by event.

    session: the agent's id of the conversation. line: the line that `result` was read from.
    pull_request: the last address of a pull or merge request that the agent named.
    """

    session: str | None = None
    result: Result | None = None
    line: Line | None = None
    pull_request: str | None = None

    def on_line(self, line: Line, events: Iterable[AgentEvent]) -> None:
        for event in events:
            match event:
                case Started(session=str(session)):
                    self.session = session
                case Text(text, "agent"):
                    self.pull_request = pull_request(text) or self.pull_request
                case Result():
                    self.session = event.session or self.session
                    self.result, self.line = event, line
                    self.pull_request = pull_request(event.text) or self.pull_request

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
