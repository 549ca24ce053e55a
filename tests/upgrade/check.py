"""What is left when an order is over: every row has ended once, and no log has an error."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.upgrade.ground import Ground, Part

EXPECTED = {
    # A handler of the application is told to raise ValueError: the worker logs that with its traceback.
    ("handler_failed", re.compile(r"ValueError: told to fail$")),
}
"""Lines with a traceback, or of level error, that a process may write: the event, and how its text ends."""

# Each gives one text a fault. The application booked what it enqueued in the transaction that enqueued it.
_LOST = {
    "is booked, and not there": """
        SELECT format('row %s', b.row_id) FROM public.booked AS b
        WHERE NOT EXISTS (SELECT FROM outwake.outbox AS o WHERE o.id = b.row_id) GROUP BY b.row_id""",
    "has rows that are booked, and not there": """
        SELECT format('%s', b.tag) FROM public.booked_many AS b
        CROSS JOIN generate_series(1, b.rows - (
            SELECT count(*)::integer FROM outwake.outbox AS o WHERE o.payload ->> 'tag' = b.tag))""",
    "has not ended, or not as it should": """
        SELECT format('row %s %s %s %s', id, topic, state, errors) FROM outwake.outbox
        WHERE topic <> 'outbox.prune'
          AND state <> CASE payload ->> 'plan' WHEN 'dead' THEN 'dead' ELSE 'done' END""",
    "is done, without effect": """
        SELECT format('row %s', o.id) FROM outwake.outbox AS o
        WHERE o.topic LIKE 'shop.%' AND o.state = 'done'
          AND NOT EXISTS (SELECT FROM public.effect AS e WHERE e.row_id = o.id)""",
    "was not carried out": """
        SELECT format('prompt %s, %s: %s %s', p.id, s.inbox_status, p.status, p.reason)
        FROM outwake.prompt AS p JOIN outwake.session AS s ON s.id = p.session_id
        WHERE s.inbox_status <> 'completed' OR p.status <> 'succeeded' OR NOT EXISTS (
            SELECT FROM outwake.message AS m WHERE m.prompt_id = p.id AND m.body ->> 'type' = 'result')""",
}
_TWICE = {
    "took effect more than once": """
        SELECT format('row %s (%s)', row_id, string_agg(format('attempt %s at %s', attempt, place), ', '))
        FROM public.effect GROUP BY row_id HAVING count(*) > 1""",
    "has more rows than are booked": """
        SELECT t.tag FROM (
            SELECT o.payload ->> 'tag' AS tag, count(*) AS rows FROM outwake.outbox AS o GROUP BY 1) AS t
        LEFT JOIN public.booked_many AS b ON b.tag = t.tag
        WHERE t.tag IS NOT NULL AND t.rows > coalesce(b.rows, 0)""",
    "is there, and not booked": """
        SELECT format('row %s', o.id) FROM outwake.outbox AS o
        WHERE o.topic LIKE 'shop.%' AND NOT o.payload ? 'tag'
          AND NOT EXISTS (SELECT FROM public.booked AS b WHERE b.row_id = o.id)""",
    "has two results of its last attempt": """
        SELECT format('prompt %s', m.prompt_id) FROM outwake.message AS m
        WHERE m.body ->> 'type' = 'result' AND m.attempt = (
            SELECT max(n.attempt) FROM outwake.message AS n WHERE n.prompt_id = m.prompt_id)
        GROUP BY m.prompt_id HAVING count(*) > 1""",
}
_WRONG = {
    "is dead, and took effect": """
        SELECT format('row %s', e.row_id) FROM public.effect AS e JOIN outwake.outbox AS o ON o.id = e.row_id
        WHERE o.state <> 'done'""",
    "took effect before an earlier row of its ordering key": """
        SELECT format('row %s, key %s', row_id, ordering_key) FROM (
            SELECT row_id, ordering_key, max(row_id) OVER (PARTITION BY ordering_key ORDER BY seq) AS latest
            FROM public.effect WHERE ordering_key IS NOT NULL) AS e
        WHERE row_id < latest""",
    "ran beside more rows than its topic's limit allows": """
        SELECT format('row %s: %s', row_id, running) FROM public.effect WHERE running > 2""",
    "counts its messages with a gap": """
        SELECT format('session %s', s.id) FROM outwake.session AS s
        LEFT JOIN outwake.message AS m ON m.session_id = s.id
        GROUP BY s.id HAVING s.last_seq <> count(m.seq)""",
}


@dataclass
class Result:
    """Of one order."""

    title: str
    rows: int = 0
    sessions: int = 0
    restarts: int = 0
    rescued: int = 0
    lost: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    warnings: Counter[str] = field(default_factory=Counter)

    @property
    def faults(self) -> list[str]:
        """All of them."""
        return [f"{self.title}: {text}" for text in (*self.lost, *self.twice)] + self.wrong


async def check(ground: Ground) -> Result:
    """When every row has ended and every process has."""
    result = Result(ground.title, restarts=ground.restarts, rescued=ground.rescued)
    result.rows = await ground.one("SELECT count(*) FROM outwake.outbox WHERE topic <> 'outbox.prune'")
    result.sessions = len(ground.sessions.made)
    result.lost = await _faults(ground, _LOST)
    prompts = {
        row[0]: row[1]
        for row in await _all(ground, "SELECT session_id::text, count(*) FROM outwake.prompt GROUP BY 1")
    }
    for session, count in ground.sessions.made.items():
        if prompts.get(session) != count:
            result.lost.append(f"session {session} has {prompts.get(session)} prompts of {count}")
    result.twice = await _faults(ground, _TWICE)
    result.wrong = [f"{ground.title}: {text}" for text in await _faults(ground, _WRONG)] + ground.failures
    for part in (*ground.ended, *ground.parts):
        result.wrong += [f"{ground.title}: {part.name} wrote: {line}" for line in unexpected(part)]
        result.warnings.update(e["event"] for e in part.process.events if e.get("level") == "warning")
    return result


async def _faults(ground: Ground, checks: dict[str, str]) -> list[str]:
    return [f"{row[0]} {words}" for words, query in checks.items() for row in await _all(ground, query)]


async def _all(ground: Ground, query: str) -> list[tuple[object, ...]]:
    cursor = await ground.conn.execute(query.encode())
    return await cursor.fetchall()


def unexpected(part: Part) -> Iterator[str]:
    """Lines of its log that are none of ours, or tell of an error that is not in EXPECTED."""
    for line in part.process.stderr:
        try:
            fields = json.loads(line)
        except ValueError:
            yield line
            continue
        text = str(fields.get("exception", "")).strip()
        known = any(fields.get("event") == name and end.search(text) for name, end in EXPECTED)
        if (text or fields.get("level") in ("error", "critical")) and not known:
            yield line
