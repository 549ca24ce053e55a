"""Metrics of the worker: what its agents say that they used."""

from outwake.session.events import Result
from outwake.worker.engine.metrics import STATS, Stats, declare

_TOKENS = "outwake_agent_tokens"
_TURNS = "outwake_agent_turns"
_COST = "outwake_agent_cost_usd"
_KINDS = ("input", "output", "cache_read", "cache_write")
_OUTCOMES = ("succeeded", "failed")


def declare_usage() -> None:
    """Let the worker's metrics show these counters."""
    declare(_COST, "What agents say they cost, in US dollars.")
    declare(_TOKENS, "Tokens that agents say they used.", "kind", _KINDS)
    declare(_TURNS, "Agent runs that ended with a result event.", "outcome", _OUTCOMES)


def count_usage(result: Result, stats: Stats = STATS) -> None:
    """Count what a result event says; what it does not say is not counted."""
    stats.count(_TURNS, "succeeded" if result.error is None else "failed")
    if result.cost is not None:
        stats.count(_COST, by=result.cost)
    for kind in _KINDS:
        if (tokens := getattr(result.tokens, kind)) is not None:
            stats.count(_TOKENS, kind, by=tokens)
