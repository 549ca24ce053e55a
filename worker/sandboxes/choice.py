"""Which provider lends a session's sandbox, and which one gets it back."""

from collections.abc import Callable
from pathlib import Path

from outwake.settings import Settings
from outwake.worker.errors import TransientError
from outwake.worker.sandboxes.base import Item, SandboxProvider
from outwake.worker.sandboxes.directory import DirectoryProvider


def lent_kind(settings: Settings) -> str:
    """The kind that this worker lends: OUTWAKE_SANDBOX's, or else the allocator's where there is one."""
    return settings.sandbox or ("directory" if settings.ip_allocator_url is None else "allocator")


def reached_by_mcp(kind: str) -> bool:
    """Whether the agent of such a sandbox runs on the worker (`Sandbox.mcp_config`)."""
    return kind == "allocator"


def provider(settings: Settings) -> SandboxProvider:
    """The one that lends."""
    return _of_kind(lent_kind(settings), settings)


def provider_of(held: Item, settings: Settings) -> SandboxProvider:
    """The one that lent what the session holds, whatever kind this worker lends itself.

    Raises TransientError if this worker is not configured for that kind: another one may be.
    """
    kind = held.get("kind")
    if kind is None:  # stored by a version that had two kinds and named neither
        item = held.get("item")
        kind = "directory" if isinstance(item, dict) and "workspace" in item else "allocator"
    return _of_kind(str(kind), settings)


def _of_kind(kind: str, settings: Settings) -> SandboxProvider:
    if (made := PROVIDERS.get(kind)) is None:
        raise TransientError(f"this worker knows no sandboxes of kind {kind[:50]!r}")
    return made(settings)


def _directory(settings: Settings) -> SandboxProvider:
    return DirectoryProvider(Path(settings.workspace_root))


def _allocator(settings: Settings) -> SandboxProvider:
    from outwake.worker.sandboxes.allocator import AllocatorProvider  # here: an idle worker saves httpx

    if settings.ip_allocator_url is None:
        raise TransientError("the sandbox is an allocator's, and IP_ALLOCATOR_URL is not set here")
    return AllocatorProvider(settings.ip_allocator_url, settings.borrow_wait, settings.sandbox_keep)


PROVIDERS: dict[str, Callable[[Settings], SandboxProvider]] = {
    "allocator": _allocator,
    "directory": _directory,
}
