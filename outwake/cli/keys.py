"""Keys that a person presses while a command runs on a terminal."""

import asyncio
import os
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def pressed(keys: bytes) -> Iterator[asyncio.Event]:
    """An event that is set when one of these keys is pressed on standard input, if that is a terminal.

    Ctrl-C still interrupts. The terminal is put back at the end.
    """
    event = asyncio.Event()
    if not sys.stdin.isatty():
        yield event
        return
    terminal, loop = sys.stdin.fileno(), asyncio.get_running_loop()

    def read() -> None:
        got = os.read(terminal, 1024)
        if not got:
            loop.remove_reader(terminal)
        elif any(key in keys for key in got):
            event.set()

    before = termios.tcgetattr(terminal)
    tty.setcbreak(terminal)
    loop.add_reader(terminal, read)
    try:
        yield event
    finally:
        loop.remove_reader(terminal)
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
