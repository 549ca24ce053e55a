"""Agents in real processes, ended by real signals.

`hold:FIFO` makes the scripted agent and its children hold a FIFO open for writing: the FIFO hangs
up when the last of them is gone. That is awaited, so no test sleeps and none looks at process ids.
"""

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from math import inf
from pathlib import Path
from typing import Any

import pytest

from outwake.worker.agents.base import AgentLine
from outwake.worker.agents.run import BATCH_LINES, Agent
from outwake.worker.errors import PermanentError
from outwake.worker.process import guarded
from outwake.worker.process.guarded import MARK
from tests.support.waits import awaiting

ROOT = Path(__file__).parents[2]
ENV = {"PYTHONPATH": str(ROOT)}
LIMIT = 60  # seconds until a test that hangs fails


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": request.param}


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    def fail(*_: object) -> None:
        raise TimeoutError(f"the test took over {LIMIT} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(LIMIT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


class Fifo:
    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path
        self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    async def gone(self) -> None:
        """Wait until the last that held the FIFO is gone."""
        poll = select.poll()
        poll.register(self.fd, 0)  # a hang-up is reported unasked
        await asyncio.to_thread(poll.poll, LIMIT * 1000)


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[Fifo]:
    fifo = Fifo(tmp_path / "held")
    yield fifo
    os.close(fifo.fd)


def scripted(prompt: str) -> list[str]:
    return [sys.executable, "-P", "-m", "outwake.embedded.agent", f"no-commit {prompt}"]


Start = Callable[..., AbstractAsyncContextManager[Agent]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    def start(argv: str | list[str], **given: Any) -> AbstractAsyncContextManager[Agent]:
        given = {"cwd": tmp_path, "env": ENV, "deadline": inf, **given}
        return Agent.start(scripted(argv) if isinstance(argv, str) else argv, **given)

    return start


async def until_ready(agent: Agent) -> None:
    async for batch in agent.lines():
        if {"type": "text", "text": "ready"} in batch:
            return
    pytest.fail("the agent ended before it was ready")


async def everything(agent: Agent) -> list[AgentLine]:
    return [event async for batch in agent.lines() for event in batch]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(
    ("command", "code"),
    [("exit 0", 0), ("exit 3", 3), ("kill -TERM $$", -15), ("kill -KILL $$", -9)],
)
async def test_the_exit_status_is_passed_on(start: Start, command: str, code: int) -> None:
    async with start(["sh", "-c", command]) as agent:
        assert await everything(agent) == []
        result = await agent.wait()
    assert (result.code, result.cause, result.left) == (code, "exited", 0)


async def test_a_missing_command_is_a_permanent_error(start: Start, tmp_path: Path) -> None:
    with pytest.raises(PermanentError, match="cannot run nonesuch: No such file"):
        async with start(["nonesuch"]):
            pass
    with pytest.raises(PermanentError, match="No such file"):
        async with start(["true"], cwd=tmp_path / "nowhere"):
            pass
    with pytest.raises(PermanentError, match="too long"):
        async with start(["true", "x" * (1 << 20)]):
            pass


async def test_the_scripted_agent_tells_what_it_is(start: Start) -> None:
    async with start("Do it") as agent:
        events = await everything(agent)
        result = await agent.wait()
    assert result.code == 0
    assert [event["type"] for event in events] == ["system", "assistant", "result"]
    assert "scripted" in events[1]["message"]["content"][0]["text"]
    assert events[-1]["is_error"] is False


async def test_only_the_allowed_environment_reaches_the_agent(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://secret")
    monkeypatch.setenv("HOME", "/nowhere")
    code = "import json, os; print(json.dumps(dict(os.environ)))"
    async with start(python(code), env={"GIVEN": "1"}) as agent:
        (event,) = await everything(agent)
    assert event["GIVEN"] == "1"
    assert event["HOME"] == "/nowhere"
    assert set(event) <= {"PATH", "HOME", "LANG", "TERM", "GIVEN", "LC_CTYPE", MARK}  # Python adds it


async def test_stdin_is_empty_and_no_file_of_ours_is_open(start: Start) -> None:
    code = "import os, sys; print([sys.stdin.read(), sorted(int(fd) for fd in os.listdir('/dev/fd'))[:4]])"
    async with start(python(code)) as agent:
        (event,) = await everything(agent)
    assert event == {"type": "text", "text": "['', [0, 1, 2, 3]]"}  # 3 is the listing itself


async def test_stderr_is_kept_bounded(start: Start) -> None:
    code = "import sys; sys.stderr.write('x' * 1_000_000 + '\\0 the end'); sys.exit(2)"
    async with start(python(code)) as agent:
        await everything(agent)
        result = await agent.wait()
    assert result.code == 2
    assert len(result.stderr) == 64 * 1024
    assert result.stderr.endswith("x\ufffd the end")


TREE = "spawn-child spawn-grandchild ignore-term raw:ready wait-forever"


async def test_stop_ends_a_tree_that_ignores_sigterm(start: Start, fifo: Fifo) -> None:
    async with start(f"hold:{fifo.path} {TREE}") as agent:
        await until_ready(agent)
        agent.stop(0.1)
        result = await agent.wait()
        assert (result.code, result.cause) == (-9, "stop")
        await fifo.gone()


async def test_a_tree_that_heeds_sigterm_gets_no_sigkill(start: Start) -> None:
    code = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); "
        "print('ready', flush=True); time.sleep(1000)"
    )
    async with start(python(code)) as agent:
        await until_ready(agent)
        agent.stop(inf)
        assert (await agent.wait()).code == 7


async def test_a_second_stop_shortens_the_grace(start: Start) -> None:
    async with start("ignore-term raw:ready wait-forever") as agent:
        await until_ready(agent)
        agent.stop(inf)
        agent.stop(0)
        assert (await agent.wait()).code == -9


async def test_a_deadline_that_passes_ends_the_agent(start: Start, fifo: Fifo) -> None:
    async with start(f"hold:{fifo.path} {TREE}", grace=0.1) as agent:
        await until_ready(agent)
        agent.extend(time.monotonic())
        assert (await agent.wait()).cause == "deadline"
        await fifo.gone()


async def test_an_agent_is_gone_at_its_deadline_though_it_ignores_sigterm(start: Start, fifo: Fifo) -> None:
    """The grace is over at the deadline, however long it is: another worker may run the row from then on."""
    ended = {}
    for cause in ("deadline", "stop", "signal", "exited"):
        prompt = "spawn-grandchild raw:ready" if cause == "exited" else TREE
        async with start(f"hold:{fifo.path} {prompt}", grace=1000, notice=0.5) as agent:
            await until_ready(agent)
            deadline = time.monotonic() + 1.0
            agent.extend(deadline)
            if cause == "stop":
                agent.stop(1000)
            elif cause == "signal":
                os.kill(agent._process.pid, signal.SIGTERM)
            ended[cause] = (await agent.wait()).cause
            await fifo.gone()
    assert ended == {cause: cause for cause in ended}


async def test_notice_is_given_before_the_deadline(start: Start) -> None:
    """An agent that heeds SIGTERM has its time to end in good order."""
    code = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); "
        "print('ready', flush=True); time.sleep(1000)"
    )
    async with start(python(code), grace=1000, notice=999) as agent:
        await until_ready(agent)
        agent.extend(time.monotonic() + 1000)
        ended = await agent.wait()
    assert (ended.code, ended.cause) == (7, "deadline")


async def test_an_extended_deadline_lets_it_run(start: Start, tmp_path: Path) -> None:
    release = tmp_path / "release"
    os.mkfifo(release)
    deadline = time.monotonic() + 3
    async with start(f"wait-for:{release} raw:ready", deadline=deadline) as agent:
        agent.extend(inf)
        await asyncio.sleep(deadline - time.monotonic() + 0.1)  # the passing of time is the point
        (await asyncio.to_thread(release.open, "wb")).close()
        await until_ready(agent)
        assert (await agent.wait()).cause == "exited"


async def test_a_timeout_is_not_extended(start: Start) -> None:
    async with start("wait-forever", timeout=0.1) as agent:
        agent.extend(inf)
        await everything(agent)
        assert (await agent.wait()).cause == "timeout"


async def test_what_an_agent_leaves_behind_goes_with_it(start: Start, fifo: Fifo) -> None:
    async with start(f"hold:{fifo.path} spawn-child spawn-grandchild fail:3", grace=0.1) as agent:
        await everything(agent)
        result = await agent.wait()
        assert (result.code, result.cause) == (3, "exited")
        await fifo.gone()


async def test_a_fork_bomb_is_ended(start: Start, fifo: Fifo) -> None:
    bomb = (  # each process lives for a moment and leaves one of a new session
        f"import os, time; os.open({str(fifo.path)!r}, os.O_WRONLY); print('ready', flush=True)\n"
        "while True:\n if os.fork(): time.sleep(0.002); os._exit(0)\n os.setsid()"
    )
    async with start(python(bomb), grace=0) as agent:
        await until_ready(agent)
        agent.stop(0)
        await agent.wait()
        await fifo.gone()


async def test_leaving_ends_the_agent(start: Start, fifo: Fifo) -> None:
    async with start(f"hold:{fifo.path} {TREE}", grace=0.1) as agent:
        await until_ready(agent)
    await fifo.gone()


async def test_cancelling_ends_the_agent(start: Start, fifo: Fifo) -> None:
    ready = asyncio.Event()

    async def handler() -> None:
        async with start(f"hold:{fifo.path} {TREE}", grace=0.5) as agent:
            await until_ready(agent)
            ready.set()
            await everything(agent)

    # Cancelled once it waits for the end, cancelled twice it leaves the end to the guardian.
    for times in (1, 2):
        ready.clear()
        task = asyncio.create_task(handler())
        async with awaiting("the agent to be ready"):
            await ready.wait()
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
        await fifo.gone()
        await asyncio.gather(*guarded._watchers)


async def test_a_killed_guardian_takes_the_agent_along(start: Start, fifo: Fifo) -> None:
    async with start(f"hold:{fifo.path} spawn-child ignore-term raw:ready wait-forever") as agent:
        await until_ready(agent)
        os.kill(agent._process.pid, signal.SIGKILL)
        result = await agent.wait()
        assert (result.code, result.cause) == (-9, "lost")
        await fifo.gone()


async def test_what_escaped_from_the_group_of_a_killed_guardian_is_ended(start: Start, fifo: Fifo) -> None:
    async with start(f"hold:{fifo.path} spawn-grandchild raw:ready wait-forever") as agent:
        await until_ready(agent)
        os.kill(agent._process.pid, signal.SIGKILL)
        assert (await agent.wait()).cause == "lost"
        await fifo.gone()


async def test_a_stopped_guardian_is_continued(start: Start, fifo: Fifo) -> None:
    code = (
        "import os, signal; os.kill(os.getppid(), signal.SIGSTOP); "
        f"os.open({str(fifo.path)!r}, os.O_WRONLY); print('ready', flush=True); signal.pause()"
    )
    async with start(python(code)) as agent:
        await until_ready(agent)
        agent.stop(0.1)
        assert (await agent.wait()).cause == "stop"
        await fifo.gone()


async def test_a_guardian_that_is_kept_stopped_is_not_waited_for(
    start: Start, fifo: Fifo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarded, "LATE", 0.5)
    code = (
        "import os, signal, time\n"
        f"guardian = os.getppid(); os.open({str(fifo.path)!r}, os.O_WRONLY)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); told = False\n"
        "if os.fork(): signal.pause()\n"
        "os.setsid()\n"
        "while True:\n"
        "    os.kill(guardian, signal.SIGSTOP)\n"
        "    told = told or print('ready', flush=True) is None\n"
    )
    async with start(python(code)) as agent:
        await until_ready(agent)
        agent.stop(0)
        assert (await agent.wait()).cause == "stop"
        await fifo.gone()


async def test_what_had_to_be_ended_is_named(start: Start) -> None:
    async with start("spawn-child fail:0", grace=0.1) as agent:
        await everything(agent)
        assert (await agent.wait()).stopped == (Path(sys.executable).name,)


async def test_a_signal_to_the_guardian_ends_the_agent(start: Start, fifo: Fifo) -> None:
    async with start(f"hold:{fifo.path} spawn-child raw:ready wait-forever") as agent:
        await until_ready(agent)
        os.kill(agent._process.pid, signal.SIGTERM)
        assert (await agent.wait()).cause == "signal"
        await fifo.gone()


WORKER = """
import asyncio, sys, time
from pathlib import Path
from outwake.worker.agents.run import Agent

async def main(lease, argv):
    async def renew(agent):
        while True:
            agent.extend(time.monotonic() + lease)
            await asyncio.sleep(lease / 5)
    async with Agent.start(
        argv, cwd=Path(), env={"PYTHONPATH": "."}, deadline=time.monotonic() + lease, grace=0.1
    ) as agent:
        print(agent._process.pid, flush=True)
        renewal = asyncio.create_task(renew(agent))
        async for batch in agent.lines():
            print(batch, flush=True)
        print((await agent.wait()).cause, flush=True)
        renewal.cancel()

asyncio.run(main(float(sys.argv[1]), sys.argv[2:]))
"""


Worker = subprocess.Popen[str]
Work = Callable[[str, float], Worker]


@pytest.fixture
def work() -> Iterator[Work]:
    """Start a process that runs an agent and renews its lease; prints the guardian's id first."""
    started = []

    def work(prompt: str, lease: float) -> Worker:
        worker = subprocess.Popen(
            [*python(WORKER), str(lease), *scripted(prompt)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(worker)
        return worker

    yield work
    for worker in started:
        worker.kill()
        with worker:
            pass


def read_until_ready(worker: Worker) -> int:
    """The guardian's id."""
    assert worker.stdout
    guardian = int(worker.stdout.readline())
    assert any("'ready'" in line for line in worker.stdout)
    return guardian


async def test_a_killed_worker_takes_its_agents_along(work: Work, fifo: Fifo) -> None:
    worker = work(f"hold:{fifo.path} {TREE}", 1000)
    read_until_ready(worker)
    worker.send_signal(signal.SIGKILL)
    await fifo.gone()


async def test_a_stopped_worker_loses_its_agents(work: Work, fifo: Fifo) -> None:
    worker = work(f"hold:{fifo.path} {TREE}", 2)
    read_until_ready(worker)
    worker.send_signal(signal.SIGSTOP)
    await asyncio.to_thread(os.waitid, os.P_PID, worker.pid, os.WSTOPPED)
    await fifo.gone()  # the worker can't have done that
    worker.send_signal(signal.SIGCONT)
    assert worker.stdout
    assert worker.stdout.readlines()[-1] == "deadline\n"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's promise, on Linux only")
async def test_an_agent_dies_though_worker_and_guardian_are_killed(work: Work, fifo: Fifo) -> None:
    worker = work(f"hold:{fifo.path} ignore-term raw:ready wait-forever", 1000)
    guardian = read_until_ready(worker)
    worker.send_signal(signal.SIGSTOP)
    await asyncio.to_thread(os.waitid, os.P_PID, worker.pid, os.WSTOPPED)
    os.kill(guardian, signal.SIGKILL)
    await fifo.gone()


async def test_a_line_comes_at_once_and_a_burst_in_batches(start: Start, tmp_path: Path) -> None:
    release = tmp_path / "release"
    os.mkfifo(release)
    prompt = f"raw:ready wait-for:{release} lines:3000 raw:last-\\xff"
    async with start(prompt) as agent:
        batches = []
        async for batch in agent.lines():
            if {"type": "text", "text": "ready"} in batch:  # though nothing follows until we act
                (await asyncio.to_thread(release.open, "wb")).close()
            batches.append(batch)
    said = [event for batch in batches for event in batch]
    numbers = [
        int(event["message"]["content"][0]["text"].split()[0])
        for event in said
        if event["type"] == "assistant" and event["message"]["content"][0]["text"].endswith("x")
    ]
    assert numbers == list(range(3000))
    assert said[-2]["text"] == "last-\ufffd"
    assert max(map(len, batches)) <= BATCH_LINES
    assert len(batches) < 1000


async def test_nothing_is_read_before_it_is_asked_for(start: Start, tmp_path: Path) -> None:
    written = tmp_path / "written"
    os.mkfifo(written)
    code = (
        "import os, sys\n"
        "os.set_blocking(1, False); written = 0\n"
        "try:\n"
        "    while True: written += os.write(1, b'x' * 1023 + b'\\n')\n"
        "except BlockingIOError: open(sys.argv[1], 'w').write(str(written))"
    )
    async with start([*python(code), str(written)]) as agent:
        full = int(await asyncio.to_thread(written.read_text))
        assert full <= 64 * 1024
        assert len(await everything(agent)) == full // 1024


CONSUMER = """
import asyncio, json, sys
from math import inf
from pathlib import Path
from outwake.worker.agents.run import Agent

async def main(argv):
    events = []
    async with Agent.start(argv, cwd=Path(), env={"PYTHONPATH": "."}, deadline=inf) as agent:
        count = 0
        async for batch in agent.lines():
            count += len(batch)
            events = [event for event in batch if event["type"] == "truncated"] or events
        assert (await agent.wait()).code == 0
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    print(json.dumps([count, int(status["VmHWM"].split()[0]), [e["bytes"] for e in events]]))

asyncio.run(main(sys.argv[1:]))
"""


def consume(prompt: str) -> tuple[int, int, list[int]]:
    """Number of events, peak memory of the consumer in KiB, lengths of truncated lines."""
    done = subprocess.run(
        [*python(CONSUMER), *scripted(prompt)], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    count, peak, lengths = json.loads(done.stdout)
    return count, peak, lengths


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads VmHWM from /proc")
def test_memory_stays_flat() -> None:
    few, base, _ = consume("lines:10")
    many, much, _ = consume("lines:180000")  # 200 MB
    assert many == few - 10 + 180_000
    assert much < base + 16 * 1024
    _, long, lengths = consume("bigline:50000000")
    assert lengths == [50_000_000]
    assert long < base + 16 * 1024
