"""Secrets that this worker knows, removed from everything that is stored or shown.

This is a second safeguard behind the rule that secrets are passed only by file and environment: a program may
print its input, and an error may quote it. The work is linear in the text.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, Self
from urllib.parse import quote

from outwake.telemetry.log import HIDDEN, SHORTEST, redact_text
from outwake.url import secrets_of_url

_NAMES = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL)S?$")
_BEFORE = 4096  # characters before a cut that may show that what follows is a secret


class Secrets:
    """Values to hide, each also in its URL-encoded and JSON-encoded spelling."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        spelled = {
            form
            for value in values
            if len(value) >= SHORTEST
            for form in (value, quote(value, safe=""), json.dumps(value, ensure_ascii=False)[1:-1])
        }
        # The longest first, because one value may be part of another.
        self._values = sorted(spelled, key=len, reverse=True)

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """The values of variables whose names suggest a secret, and the passwords of URLs in any variable."""
        found = [value for name, value in environment.items() if _NAMES.search(name.upper())]
        words = (word for value in found for word in value.split())
        passwords = (word for value in environment.values() for word in secrets_of_url(value))
        return cls([*found, *words, *passwords])

    def __or__(self, others: Iterable[str]) -> "Secrets":
        return Secrets([*self._values, *others])

    def text(self, text: str) -> str:
        """The text without these values, and without text that looks like a secret."""
        return redact_text(self._replace(text))

    def last(self, text: str, length: int) -> str:
        """The last `length` characters of the same. Only the end of the text is searched by form."""
        text = self._replace(text)
        return redact_text(text[-length - _BEFORE :])[-length:]

    def line(self, line: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """An agent's line without these values, and its JSON; the rest of the line is unchanged."""
        spelled = json.dumps(line, ensure_ascii=False)
        # A match may be a false one, part of an escape, so the values themselves are searched then.
        if not any(value in spelled for value in self._values):
            return line, spelled
        hidden: dict[str, Any] = self._hide(line)
        return hidden, json.dumps(hidden, ensure_ascii=False)

    def _hide(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._replace(value)
        if isinstance(value, dict):
            return {self._replace(key): self._hide(part) for key, part in value.items()}
        if isinstance(value, list):
            return [self._hide(part) for part in value]
        return value

    def _replace(self, text: str) -> str:
        for value in self._values:
            text = text.replace(value, HIDDEN)
        return text
