"""A wait that fails says what it waited for and what it saw."""

import asyncio

import pytest

from tests.support.waits import NotSeenError, awaiting


async def test_a_wait_that_fails_says_what_it_waited_for_and_what_it_saw() -> None:
    seen: list[str] = []
    with pytest.raises(NotSeenError, match=r"waited 0.01 s for the second word; last seen: \['first'\]"):
        async with awaiting("the second word", seen=lambda: seen, timeout=0.01):
            seen.append("first")
            await asyncio.Event().wait()


async def test_what_cannot_be_seen_does_not_hide_what_was_waited_for() -> None:
    async def broken() -> str:
        raise ValueError("gone")

    with pytest.raises(NotSeenError, match=r"for the end; what there is to see could not be read: .*gone"):
        async with awaiting("the end", seen=broken, timeout=0.01):
            await asyncio.Event().wait()


async def test_a_timeout_of_the_block_is_its_own() -> None:
    with pytest.raises(TimeoutError, match="the block's"):
        async with awaiting("the end"):
            raise TimeoutError("the block's")
