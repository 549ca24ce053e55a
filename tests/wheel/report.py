"""Counts checks, and prints those that fail."""

import time


class Report:
    """The checks made so far."""

    def __init__(self) -> None:
        self.made = 0
        self.failed = 0
        self._where = ""
        self._since = time.monotonic()

    def begin(self, where: str) -> None:
        """Say where the following checks are made."""
        self._where = where
        print(f"{time.monotonic() - self._since:4.0f} s  {where}", flush=True)

    def that(self, what: str, holds: bool, seen: object = "") -> None:
        """Count a check. If it fails, print what should hold, and what was seen instead."""
        self.made += 1
        if not holds:
            self.failed += 1
            print(f"FAILED {self._where}: {what}\n{seen}".rstrip(), flush=True)

    def same(self, what: str, seen: object, expected: object) -> None:
        """Count a check of two values that must be equal."""
        self.that(what, seen == expected, f"  expected {expected!r}\n  seen     {seen!r}")

    def __str__(self) -> str:
        return f"wheel: {self.made} checks, {self.failed} failed"
