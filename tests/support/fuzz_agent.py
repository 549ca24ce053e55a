"""An agent that does what it is told, for tests/fuzz_agents.py. Its prompt is JSON:

    {"case": 7, "record": DIRECTORY, "steps": [["out", "text", 3], ["file", "a/b", 10], ["exit", 0]]}

In DIRECTORY/CASE.runs it notes each run, in DIRECTORY/CASE.files each file that it wrote. It imports nothing
of the tree, so that it starts fast.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WHO = ("-c", "user.name=A", "-c", "user.email=a@b")


class Agent:
    def __init__(self, prompt: dict[str, Any]) -> None:
        self._record = Path(prompt["record"])
        self._case = prompt["case"]
        self._steps = prompt["steps"]

    def run(self) -> None:
        self._note("runs", str(os.getpid()))
        for name, *values in self._steps:
            getattr(self, f"do_{name}")(*values)

    def _note(self, kind: str, text: str) -> None:
        with (self._record / f"{self._case}.{kind}").open("a") as file:
            file.write(json.dumps(text) + "\n")

    def do_out(self, text: str, times: int) -> None:
        """Print text, which has a character for each byte."""
        sys.stdout.buffer.write(text.encode("latin-1") * times)
        sys.stdout.buffer.flush()

    def do_say(self, text: str, times: int) -> None:
        """Say text as the Claude Code CLI does."""
        print(json.dumps({"type": "assistant", "message": {"content": text * times}}), flush=True)

    def do_flood(self, how: str, patterns: list[str], size: int) -> None:
        """Print each pattern again and again, each in a line of its own: the worker cuts a longer one."""
        for pattern in patterns:
            text = pattern * (size // len(pattern))
            getattr(self, f"do_{how}")(text if how == "say" else text + "\n", 1)

    def do_items(self, item: str, times: int) -> None:
        """Print an event with a list of so many items."""
        print('{"type": "x", "items": [' + ", ".join([item] * times) + "]}", flush=True)

    def do_err(self, text: str, times: int) -> None:
        sys.stderr.buffer.write(text.encode("latin-1") * times)
        sys.stderr.buffer.flush()

    def do_file(self, path: str, size: int) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(b"x" * size)
        self._note("files", path)

    def do_git(self, *arguments: str) -> None:
        subprocess.run(["git", *WHO, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def do_child(self) -> None:
        """Leave a child that holds our output open."""
        subprocess.Popen(["sleep", "1000"])

    def do_daemon(self) -> None:
        """Leave a process that has left our group and session."""
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                time.sleep(1000)
            os._exit(0)
        os.wait()

    def do_stay(self) -> None:
        time.sleep(1000)

    def do_ignore(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def do_close(self) -> None:
        os.close(1)
        os.open(os.devnull, os.O_WRONLY)

    def do_guardian(self, number: int) -> None:
        os.kill(os.getppid(), number)

    def do_kill(self, number: int) -> None:
        os.kill(os.getpid(), number)

    def do_exit(self, code: int) -> None:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    Agent(json.loads(sys.argv[-1])).run()
