"""Runs the examples of a docs page, and compares what they print with what the page says.

    ```console
    $ curl -s localhost:8000/healthz
    {"status": "alive"}
    ```

JSON is shown indented. Ids, cursors, marks and times differ from run to run: each id of the page stands for
the one that took its place. `<!-- hand: claim -->` between the blocks lets a worker do something first.
"""

import json
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_CURSOR = re.compile(r"WyI[A-Za-z0-9_-]{60,}")
_MARK = re.compile(r"(?<=\b\d-)[0-9a-f]{8}\b")  # of a state, in the id of a stream's last event
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+\+00:00")
_IDS = (_UUID, _CURSOR, _MARK)
_TAIL = re.compile(r"(?<=-)[0-9a-f]{8}(?=[\"'\n]|$)")
_VARYING_HEADERS = re.compile(r"^(date|content-length|transfer-encoding): .*\n", re.MULTILINE)
_PART = re.compile(r"```console\n(?P<block>.*?)```|<!-- hand: (?P<hand>[^>]*?) -->", re.DOTALL)


@dataclass
class Example:
    command: str
    output: str


def examples(block: str) -> list[Example]:
    """The commands of a block with what they print."""
    found: list[Example] = []
    continued = False
    for line in block.splitlines(keepends=True):
        if line.startswith("$ ") or continued:
            if continued:
                found[-1].command += line
            else:
                found.append(Example(line[2:], ""))
            continued = line.rstrip("\n").endswith("\\")
        else:
            found[-1].output += line
    return found


def shown(output: str) -> str:
    """An output as a page shows it."""
    output = _VARYING_HEADERS.sub("", output.replace("\r\n", "\n"))
    head, separator, body = output.rpartition("\n\n") if output.startswith("HTTP/") else ("", "", output)
    with suppress(ValueError):
        body = json.dumps(json.loads(body), indent=2, ensure_ascii=False)
    return (head + separator + body).rstrip("\n") + "\n"


class Page:
    """A page whose examples are run in order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = path.read_text(encoding="utf-8")
        self._real: dict[str, str] = {}

    async def run(
        self, shell: Callable[[str], Awaitable[str]], manual: Callable[[str], Awaitable[None]]
    ) -> str:
        """Run everything; the page with what was printed now, equal to its text if nothing has changed."""
        written, position = "", 0
        for part in _PART.finditer(self.text):
            written += self.text[position : part.start()]
            position = part.end()
            if part["hand"] is not None:
                await manual(part["hand"])
                written += part[0]
                continue
            written += "```console\n"
            for example in examples(part["block"]):
                output = shown(await shell(self._with_real_ids(example.command)))
                written += f"$ {example.command}{self._told(example.output, output)}"
            written += "```"
        return written + self.text[position:]

    def _with_real_ids(self, command: str) -> str:
        for pattern in _IDS:
            command = pattern.sub(lambda found: self._real.get(found[0], found[0]), command)
        return command

    def _told(self, expected: str, output: str) -> str:
        """The expected text if it says the same, else what was printed."""
        for pattern in _IDS:
            told, real = pattern.findall(expected), pattern.findall(output)
            if len(told) != len(real):
                return output
            for one, other in zip(told, real, strict=True):
                if self._real.setdefault(one, other) != other:
                    return output
        return expected if _same(expected) == _same(output) else output


def _same(text: str) -> str:
    for pattern in (*_IDS, _TIME, _TAIL):
        text = pattern.sub("…", text)
    return text
