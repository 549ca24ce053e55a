"""Run an agent for one turn: start it, store what it prints, judge how it ended.

1. The adapter says how the agent is started. Its files are written where it runs (worker/agents/place.py).
   The command that this worker starts runs under the guardian.
2. Its output comes in batches. Each batch is parsed, secrets are hidden, the events are read from it
   (outwake/session/lines.py), and the summary follows them. This work depends on what the agent prints, so a
   large batch is done in a thread.
3. The lines are stored (worker/messages.py).
4. A run is over LINGER seconds after its result, even if the program does not exit: it may hang, or a process
   that it started may hold its output open. It is ended, and judged by its result.
5. The verdict is made from the exit and the summary.
"""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID

from outwake.handler import Job, Lease
from outwake.session.events import Started
from outwake.session.lines import read
from outwake.settings import Settings
from outwake.telemetry.log import get_logger
from outwake.worker.agents.base import AgentAdapter, AgentTurn, unreached
from outwake.worker.agents.place import AgentPlace
from outwake.worker.agents.run import Agent
from outwake.worker.agents.stream import RawLine, stored
from outwake.worker.agents.summary import AgentSummary
from outwake.worker.agents.usage import count_usage
from outwake.worker.agents.verdict import Verdict, judge
from outwake.worker.engine.lease import NOTICE
from outwake.worker.errors import TransientError
from outwake.worker.messages import Messages
from outwake.worker.process.guarded import Exit
from outwake.worker.sandboxes.base import StepError
from outwake.worker.secrets import Secrets

_GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL for an agent."""
LINGER = 5.0
"""Seconds that an agent's program may take to exit after its result."""

log = get_logger(__name__)


async def run_agent(
    job: Job,
    prompt: tuple[UUID, UUID],
    adapter: AgentAdapter,
    turn: AgentTurn,
    place: AgentPlace,
    settings: Settings,
    secrets: Secrets,
) -> tuple[Verdict, AgentSummary]:
    """Run the agent to its end, and store its output under `prompt`, the ids of the session and the prompt.

    Raises SessionError if it cannot be run or was ended from outside, Fenced or Cancelled.
    """
    try:
        command = await place.lay_out(adapter.command(turn, place.box))
    except StepError as error:
        raise TransientError(str(error)) from error
    run = _Run(command.servers, secrets)
    try:
        async with (
            Messages(job, *prompt) as messages,
            Agent.start(
                command.argv,
                cwd=Path(command.cwd),
                env=command.env,
                deadline=_until(job.lease),
                notice=min(_GRACE, settings.lease * NOTICE),
                grace=_GRACE,
                timeout=settings.agent_timeout,
            ) as agent,
        ):
            log.info("agent_started", kind=adapter.name)
            ended = await _follow(agent, run, messages, job.lease)
    finally:
        if run.summary.result is not None:
            count_usage(run.summary.result)
    promised = adapter.promises_result
    return judge(ended, run.summary, promised, settings.agent_timeout, secrets), run.summary


class _Run:
    """What is made of an agent's output, batch by batch."""

    def __init__(self, servers: Sequence[str], secrets: Secrets) -> None:
        self.summary = AgentSummary()
        self._servers = servers
        self._secrets = secrets

    def digest(self, batch: Sequence[RawLine]) -> list[str]:
        """The lines to be stored, as JSON. May run in a thread, one call at a time.

        Raises TransientError if the agent says that it does not reach one of its servers.
        """
        lines = []
        for raw in batch:
            if (line := stored(raw)) is None:
                continue
            line, spelled = self._secrets.line(line)
            lines.append(spelled)
            for event in read(line):
                self.summary.on_event(event, line)
                if isinstance(event, Started) and (missing := unreached(event, self._servers)):
                    raise TransientError(f"the agent can't reach the sandbox's MCP server {missing[0]}")
        return lines


async def _follow(agent: Agent, run: _Run, messages: Messages, lease: Lease) -> Exit:
    """Store the agent's output to its end, while its guardian learns of each extension of the lease."""
    keeping = asyncio.create_task(_keep_alive(agent, lease))
    lingering: asyncio.TimerHandle | None = None
    results = 0
    try:
        async for lines in agent.batches(run.digest):
            if run.summary.results > results:
                results = run.summary.results
                if lingering is not None:
                    lingering.cancel()
                lingering = asyncio.get_running_loop().call_later(LINGER, _end, agent, run.summary)
            await messages.put(lines)
        return await agent.wait()
    finally:
        keeping.cancel()
        if lingering is not None:
            lingering.cancel()


def _end(agent: Agent, summary: AgentSummary) -> None:
    summary.lingered = True
    agent.stop(_GRACE)


async def _keep_alive(agent: Agent, lease: Lease) -> None:
    """Pass each extension of the lease to the agent's guardian."""
    while True:
        agent.extend(_until(lease))
        await lease.extended()


def _until(lease: Lease) -> float:
    return time.monotonic() + lease.remaining()
