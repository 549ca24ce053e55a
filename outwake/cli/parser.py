"""A parser of command lines that says what is wrong with one in exactly one line."""

import argparse
import sys
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Its errors are one line on standard error and the exit status 2. Its subcommands' are too."""

    def error(self, message: str) -> NoReturn:
        said = " ".join(message.split())
        # From here, because argparse repeats what it was given.
        shown = "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in said)
        print(f"{self.prog.split()[0]}: {shown}; see `{self.prog} --help`", file=sys.stderr)
        sys.exit(2)
