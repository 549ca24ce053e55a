"""The scripted agent: it prints what a coding agent prints, changes a file and commits it.

Run it as `python -P -m outwake.embedded.agent PROMPT` in a Git work tree. -P is necessary because a
repository may hold a directory that is also called `outwake`. The agent is not a model, and says so first.

It obeys the directives among the prompt's words, in order, before it makes the change. A bad value gives one
line on stderr and status 2:

| directive | effect |
|---|---|
| `sleep:SECONDS` | sleeps |
| `wait-for:PATH` | opens a FIFO for reading and waits until its writers have closed it |
| `hold:PATH` | opens a FIFO for writing that it and its children hold until the last is gone |
| `wait-forever` | waits for ever |
| `ignore-term` | ignores SIGTERM from now on |
| `spawn-child` | starts a child that waits for ever |
| `spawn-grandchild` | starts a grandchild in a session of its own that ignores SIGTERM |
| `lines:N` | prints N assistant messages of about 1 KB |
| `bigline:N` | prints one JSON line of N bytes |
| `raw:TEXT` | prints TEXT, Python escapes such as \\x00 decoded, as a line |
| `stderr:TEXT` | writes TEXT to stderr |
| `leave:NAME` | writes a file that it doesn't commit |
| `no-commit` | makes no change |
| `end-with-error` | ends with a result that says is_error, and status 1 |
| `fail:N` | ends at once with status N |
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE = "SCRIPTED_AGENT.md"
AUTHOR = ("-c", "user.name=Scripted agent", "-c", "user.email=scripted-agent@outwake.invalid")
FOREVER = "import signal; {} print('ready', flush=True); signal.pause()"


class Script:
    """One run: the state that the directives change and the result reports."""

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt
        self.session = str(uuid.uuid4())
        self.turns = 0
        self.commits = True
        self.error = False

    def run(self) -> int:
        began = time.monotonic()
        emit(
            type="system",
            subtype="init",
            cwd=str(Path.cwd()),
            session_id=self.session,
            tools=["Write", "Bash"],
            model="scripted",
        )
        self.say("I am a scripted agent, not a language model: I do what my prompt's directives say.")
        for word in self.prompt.split():
            name, _, value = word.partition(":")
            directive = DIRECTIVES.get(name)
            if directive and bool(value) == (name in WITH_VALUE):
                try:
                    directive(self, value)
                except (OSError, ValueError) as error:
                    print(f"scripted agent: {word}: {error}", file=sys.stderr)
                    return 2
        if self.commits and not self.error:
            self.commit()
        emit(
            type="result",
            subtype="error_during_execution" if self.error else "success",
            is_error=self.error,
            session_id=self.session,
            duration_ms=round((time.monotonic() - began) * 1000),
            num_turns=self.turns,
            result="I was told to fail." if self.error else "Done.",
            total_cost_usd=0,
            usage={"input_tokens": 0, "output_tokens": 0},
        )
        return 1 if self.error else 0

    def say(self, text: str) -> None:
        self.assistant({"type": "text", "text": text})

    def assistant(self, *content: dict[str, Any]) -> None:
        self.turns += 1
        message = {"role": "assistant", "model": "scripted", "content": list(content)}
        emit(type="assistant", session_id=self.session, message=message)

    def use_tool(self, name: str, given: dict[str, Any], tool: Callable[[], str]) -> None:
        """Announce a tool, run it, print its result."""
        use = f"toolu_{uuid.uuid4().hex[:24]}"
        self.assistant({"type": "tool_use", "id": use, "name": name, "input": given})
        result = {"type": "tool_result", "tool_use_id": use, "content": tool()}
        message = {"role": "user", "content": [result]}
        emit(type="user", session_id=self.session, message=message)

    def commit(self) -> None:
        entry = f"- {self.prompt}\n"

        def write() -> str:
            with Path(FILE).open("a", encoding="utf-8", errors="replace") as file:
                file.write(entry)
            return f"wrote {FILE}"

        def commit() -> str:
            git("add", "--", FILE)
            subject = re.sub(r"\s+", " ", self.prompt)[:50].strip() or "nothing"
            git(*AUTHOR, "commit", "--quiet", "-m", f"Note what was asked: {subject}")
            return git("log", "-1", "--format=%h %s")

        self.use_tool("Write", {"file_path": FILE, "content": entry}, write)
        self.use_tool("Bash", {"command": f"git add {FILE} && git commit"}, commit)

    def wait_for(self, path: str) -> None:
        with Path(path).open("rb") as fifo:
            fifo.read()

    def hold(self, path: str) -> None:
        os.set_inheritable(os.open(path, os.O_WRONLY), True)

    def wait_forever(self, _: str) -> None:
        while True:
            signal.pause()

    def ignore_term(self, _: str) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def spawn_child(self, _: str) -> None:
        start_child(FOREVER.format(""))

    def spawn_grandchild(self, _: str) -> None:
        """Fork twice, as a daemon does, so that neither group nor parent leads to the grandchild."""
        child = os.fork()
        if child == 0:
            os.setsid()
            start_child(FOREVER.format("signal.signal(signal.SIGTERM, signal.SIG_IGN);"))
            os._exit(0)
        os.waitpid(child, 0)

    def lines(self, count: str) -> None:
        for number in range(int(count)):
            self.say(f"{number} " + "x" * 1000)

    def bigline(self, size: str) -> None:
        frame = json.dumps({"type": "assistant", "text": ""})
        filler = "x" * (int(size) - len(frame))
        print(frame.replace('""', f'"{filler}"'), flush=True)

    def raw(self, text: str) -> None:
        decoded = text.encode("latin-1", "backslashreplace").decode("unicode_escape")
        sys.stdout.buffer.write(decoded.encode("latin-1", "replace") + b"\n")
        sys.stdout.buffer.flush()

    def stderr(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def leave(self, name: str) -> None:
        Path(name).write_text("left behind\n")

    def no_commit(self, _: str) -> None:
        self.commits = False

    def end_with_error(self, _: str) -> None:
        self.error = True

    def fail(self, status: str) -> None:
        sys.exit(int(status))


WITH_VALUE: dict[str, Callable[[Script, str], None]] = {
    "sleep": lambda _, seconds: time.sleep(float(seconds)),
    "wait-for": Script.wait_for,
    "hold": Script.hold,
    "lines": Script.lines,
    "bigline": Script.bigline,
    "raw": Script.raw,
    "stderr": Script.stderr,
    "leave": Script.leave,
    "fail": Script.fail,
}
ALONE: dict[str, Callable[[Script, str], None]] = {
    "wait-forever": Script.wait_forever,
    "ignore-term": Script.ignore_term,
    "spawn-child": Script.spawn_child,
    "spawn-grandchild": Script.spawn_grandchild,
    "no-commit": Script.no_commit,
    "end-with-error": Script.end_with_error,
}
DIRECTIVES = WITH_VALUE | ALONE


def emit(**event: Any) -> None:
    print(json.dumps(event), flush=True)


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


def start_child(code: str) -> None:
    """Start Python code that prints a line when it is ready, and wait for that line."""
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", code], stdout=subprocess.PIPE, close_fds=False
    )
    assert child.stdout is not None
    child.stdout.readline()


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -P -m outwake.embedded.agent PROMPT", file=sys.stderr)
        return 2
    return Script(sys.argv[1]).run()


if __name__ == "__main__":
    sys.exit(main())
