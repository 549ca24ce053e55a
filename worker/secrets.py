"""Secrets that this worker knows, removed from everything that is stored or shown.

This is a second safeguard behind the rule that secrets are passed only by file and environment: a program may
print its input, and an error may quote it.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, Self
from urllib.parse import quote

from outwake.telemetry.log import HIDDEN, redact_text

_NAMES = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS?)$")
_SHORTEST = 6  # shorter values are ordinary words


class Secrets:
    """Values to hide, each also in its URL-encoded and JSON-encoded spelling."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        spelled = {
            form
            for value in values
            if len(value) >= _SHORTEST
            for form in (value, quote(value, safe=""), json.dumps(value, ensure_ascii=False)[1:-1])
        }
        # The longest first, because one value may be part of another.
        self._values = sorted(spelled, key=len, reverse=True)

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """The values of variables whose names suggest a secret."""
        return cls(value for name, value in environment.items() if _NAMES.search(name.upper()))

    def __or__(self, others: Iterable[str]) -> "Secrets":
        return Secrets([*self._values, *others])

    def text(self, text: str) -> str:
        """The text without these values, and without text that looks like a secret."""
        return redact_text(self._replace(text))

    def event(self, event: dict[str, Any]) -> dict[str, Any]:
        """An agent's event without these values; the rest of the event is unchanged."""
        if not self._values:
            return event
        spelled = json.dumps(event, ensure_ascii=False)
        hidden = self._replace(spelled)
        return event if hidden == spelled else dict(json.loads(hidden))

    def _replace(self, text: str) -> str:
        for value in self._values:
            text = text.replace(value, HIDDEN)
        return text
