"""Run an agent for one turn: start it, store what it prints, judge how it ended."""

import asyncio
import time
from collections.abc import Iterable, Sequence
from uuid import UUID

from outwake.handler import Job, Lease
from outwake.session.events import AgentEvent, Started
from outwake.settings import Settings
from outwake.telemetry.log import get_logger
from outwake.worker.agents.base import AgentAdapter, AgentTurn, Box, lay_out, unreached
from outwake.worker.agents.run import Agent
from outwake.worker.agents.summary import AgentSummary
from outwake.worker.agents.usage import count_usage
from outwake.worker.agents.verdict import Verdict, judge
from outwake.worker.errors import TransientError
from outwake.worker.messages import Messages
from outwake.worker.process.guarded import Exit
from outwake.worker.sandboxes.base import Sandbox
from outwake.worker.secrets import Secrets

_GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL for an agent."""

_NOTICE = 1 / 6
"""Part of a lease that is left when an agent gets SIGTERM, so that it is gone when the lease ends. A renewal
has failed twice by then."""

log = get_logger(__name__)


async def run_agent(
    job: Job,
    prompt: tuple[UUID, UUID],
    adapter: AgentAdapter,
    turn: AgentTurn,
    box: Box,
    sandbox: Sandbox,
    settings: Settings,
    secrets: Secrets,
) -> tuple[Verdict, AgentSummary]:
    """Run the agent to its end, and store its output under `prompt`, the ids of the session and the prompt.

    Raises SessionError if it cannot be run or was ended from outside, Fenced or Cancelled.
    """
    command = adapter.command(turn, box)
    await asyncio.to_thread(lay_out, command, box)
    summary = AgentSummary()
    async with (
        Messages(job, *prompt) as messages,
        Agent.start(
            sandbox.agent_argv(command.argv),
            cwd=command.cwd,
            env=command.env,
            deadline=_until(job.lease),
            notice=min(_GRACE, settings.lease * _NOTICE),
            grace=_GRACE,
            timeout=settings.agent_timeout,
        ) as agent,
    ):
        log.info("agent_started", kind=adapter.name)
        keeping = asyncio.create_task(_keep_alive(agent, job.lease))
        try:
            async for batch in agent.lines():
                hidden = [secrets.event(line) for line in batch]
                for line in hidden:
                    events = list(adapter.read(line))
                    summary.on_line(line, events)
                    _check_servers(events, command.servers)
                await messages.put(hidden)
            ended: Exit = await agent.wait()
        finally:
            keeping.cancel()
            if summary.result is not None:
                count_usage(summary.result)
    return judge(ended, summary.result, settings.agent_timeout, secrets), summary


def _check_servers(events: Iterable[AgentEvent], servers: Sequence[str]) -> None:
    for event in events:
        if isinstance(event, Started) and (missing := unreached(event, servers)):
            raise TransientError(f"the agent can't reach the sandbox's MCP server {missing[0]}")


async def _keep_alive(agent: Agent, lease: Lease) -> None:
    """Pass each extension of the lease to the agent's guardian."""
    while True:
        agent.extend(_until(lease))
        await lease.extended()


def _until(lease: Lease) -> float:
    return time.monotonic() + lease.remaining()
