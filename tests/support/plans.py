"""The plans of the statements that a statement runs, and what they read: auto_explain's."""

import json
from collections.abc import Iterator
from typing import Any

from tests.support.steps import Connection

FEW_BUFFERS = 300
"""What a claim of one row may touch, writes to the table and its indexes included."""


class Explained(list[dict[str, Any]]):
    """The plans of the statements that a call ran, outermost last."""

    def buffers(self) -> int:
        """Pages touched by the outermost statement, those inside it included."""
        plan = self[-1]["Plan"]
        return int(plan["Shared Hit Blocks"]) + int(plan["Shared Read Blocks"])

    def nodes(self) -> Iterator[dict[str, Any]]:
        waiting = [plan["Plan"] for plan in self]
        while waiting:
            node = waiting.pop()
            waiting += node.get("Plans", [])
            yield node

    def indexes(self) -> set[str]:
        return {node["Index Name"] for node in self.nodes() if "Index Name" in node}

    def read_in_full(self) -> list[str]:
        """The statements that read every row of a table that grows."""
        return [
            plan["Query Text"]
            for plan in self
            for node in Explained([plan]).nodes()
            if node["Node Type"] == "Seq Scan"
            and node.get("Actual Loops")
            and node.get("Relation Name") in ("outbox", "session", "prompt", "message")
        ]


async def explain(conn: Connection, query: str, *values: Any) -> Explained:
    """Run a statement for real, and return the plans of all it ran."""
    found = Explained()

    def keep(notice: Any) -> None:
        _, _, text = (notice.message_primary or "").partition("plan:\n")
        if text:
            found.append(json.loads(text))

    await conn.execute("LOAD 'auto_explain'")
    await conn.execute(
        "SELECT set_config('auto_explain.' || name, value, false) FROM (VALUES ('log_analyze', 'on'),"
        " ('log_buffers', 'on'), ('log_nested_statements', 'on'), ('log_format', 'json'),"
        " ('log_timing', 'off'), ('log_level', 'notice'), ('log_min_duration', '0')) AS s (name, value)"
    )
    conn.add_notice_handler(keep)
    await conn.execute(query.encode(), values or None)
    conn.remove_notice_handler(keep)
    await conn.execute("SET auto_explain.log_min_duration = -1")
    assert found
    return found
