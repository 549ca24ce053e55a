"""The schema as text, the same on every server version: what a migration changes shows in its diff.

    python -m tests.support.schema          writes tests/schema.txt, from a database of its own

Bodies of functions are left out: they are in sql/ as they are.
"""

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import psycopg

from outwake._migrate import migrate
from outwake.schema import SCHEMA

_QUERY = """
WITH tables AS (
    SELECT c.oid, c.relname, c.relkind, c.relpersistence, c.reloptions
    FROM pg_class c
    WHERE c.relnamespace = 'outwake'::regnamespace AND c.relkind IN ('r', 'v')
      AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = c.oid AND d.deptype = 'e')
)
SELECT line FROM (
    SELECT relname AS a, 0 AS b, '' AS c,
        E'\\n' || CASE WHEN relkind = 'v' THEN 'view ' WHEN relpersistence = 'u' THEN 'unlogged table '
            ELSE 'table ' END || relname || coalesce(' with ' || reloptions::text, '') AS line
    FROM tables
    UNION ALL
    SELECT t.relname, 1, lpad(a.attnum::text, 4),
        '    ' || a.attname || ' ' || format_type(a.atttypid, a.atttypmod)
        || CASE WHEN a.attnotnull THEN ' not null' ELSE '' END
        || CASE WHEN a.attidentity <> '' THEN ' identity' ELSE '' END
        || coalesce(' default ' || pg_get_expr(d.adbin, d.adrelid), '')
    FROM tables t
    JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum > 0 AND NOT a.attisdropped
    LEFT JOIN pg_attrdef d ON d.adrelid = t.oid AND d.adnum = a.attnum
    UNION ALL
    SELECT t.relname, 2, k.conname, '    constraint ' || k.conname || ' ' || pg_get_constraintdef(k.oid)
    FROM tables t JOIN pg_constraint k ON k.conrelid = t.oid AND k.contype IN ('c', 'f', 'p', 'u', 'x')
    UNION ALL
    SELECT t.relname, 3, i.indexrelid::regclass::text, '    ' || pg_get_indexdef(i.indexrelid)
    FROM tables t JOIN pg_index i ON i.indrelid = t.oid
    WHERE NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = i.indexrelid AND k.contype IN ('p', 'u'))
    UNION ALL
    SELECT t.relname, 4, g.tgname,
        '    ' || CASE g.tgenabled WHEN 'A' THEN 'always: ' ELSE '' END || pg_get_triggerdef(g.oid)
    FROM tables t JOIN pg_trigger g ON g.tgrelid = t.oid AND NOT g.tgisinternal
    UNION ALL
    SELECT '~', 5, p.oid::regprocedure::text,
        E'\\nfunction ' || p.proname || '(' || pg_get_function_arguments(p.oid) || E')\\n    returns '
        || pg_get_function_result(p.oid)
        || CASE p.provolatile WHEN 'v' THEN ' volatile' WHEN 's' THEN ' stable' ELSE ' immutable' END
        || CASE WHEN p.prosecdef THEN ' security definer' ELSE '' END
        || coalesce(' set ' || array_to_string(p.proconfig, ' '), '')
    FROM pg_proc p
    WHERE p.pronamespace = 'outwake'::regnamespace
      AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e')
) AS lines
ORDER BY a COLLATE "C", b, c COLLATE "C"
"""


async def describe(conn: psycopg.AsyncConnection[Any]) -> str:
    """Tables with columns, constraints, indexes and triggers, then the functions' signatures."""
    rows = await (await conn.execute(_QUERY.encode())).fetchall()
    return "\n".join(row[0] for row in rows).lstrip("\n") + "\n"


async def _main() -> None:
    from outwake.embedded.postgres import EmbeddedPostgres

    with tempfile.TemporaryDirectory() as directory:
        server = EmbeddedPostgres(Path(directory) / "data", settings={"fsync": "off"})
        try:
            await asyncio.to_thread(server.start)
            await migrate(server.url)
            options = f"-c search_path={SCHEMA.name},public"
            async with await psycopg.AsyncConnection.connect(server.url, options=options) as conn:
                text = await describe(conn)
        finally:
            await asyncio.to_thread(server.remove)
    (Path(__file__).parents[1] / "schema.txt").write_text(text)


if __name__ == "__main__":
    asyncio.run(_main())
