"""Read a file of a sandbox through the output of its steps, and run steps again that may pass."""

import asyncio
import base64
import binascii
import hashlib
import re
from collections.abc import Awaitable, Callable
from typing import TypeVar

from outwake.telemetry.log import get_logger
from outwake.worker.errors import TransientError
from outwake.worker.sandboxes.base import StepTimeout

AGAIN = (1.0, 5.0)  # seconds between tries of what may pass
_CHUNK = 96 * 1024  # bytes of a file printed by one step

DIGEST = 'digest=$(sha256sum < "$1"); size=$(wc -c < "$1"); echo "${digest%% *} $((size))"'
"""The end of a script: prints the SHA-256 and the size of the file $1."""
_READ = 'tail -c "+$2" "$1" | head -c "$3" | base64'
_DIGEST = re.compile(r"([0-9a-f]{64}) ([0-9]{1,15})")

T = TypeVar("T")

log = get_logger(__name__)


def digest_of(output: str) -> tuple[str, int]:
    """What DIGEST printed, in the last line. Raises TransientError if that is not there."""
    found = _DIGEST.fullmatch(output.rpartition("\n")[2].strip())
    if found is None:
        raise TransientError("the sandbox did not answer a step as its script would")
    return found[1], int(found[2])


async def read_file(run: Callable[..., Awaitable[str]], path: str, digest: str, size: int) -> bytes:
    """The file, of that digest and size. run: runs a script with arguments, as `Sandbox.run` does.

    Raises TransientError if it is another file, and what `run` raises.
    """
    content = bytearray()
    while len(content) < size:
        try:
            chunk = base64.b64decode(await run(_READ, path, str(len(content) + 1), str(_CHUNK)))
        except binascii.Error:
            chunk = b""
        if not chunk:
            break
        content += chunk[: size - len(content)]
    read = await asyncio.to_thread(hashlib.sha256, content)
    if read.hexdigest() != digest:
        raise TransientError("a file could not be read from the sandbox")
    return bytes(content)


async def again(step: str, act: Callable[[], Awaitable[T]]) -> T:
    """Do it, and again after a while if it failed for a reason that may pass. A step that took too long would
    take too long again.
    """
    for pause in AGAIN:
        try:
            return await act()
        except StepTimeout:
            raise
        except TransientError as error:
            log.warning("step_failed", step=step, reason=str(error), retry_in=pause)
            await asyncio.sleep(pause)
    return await act()
