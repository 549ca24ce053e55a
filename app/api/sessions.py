"""Sessions and their prompts: what the API's routes and the dashboard's pages both call.

Each function decides by `identity` what this user may see and do. A session of another user is not found.
Answers are the database's JSON, as text.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any, LiteralString, NamedTuple
from uuid import UUID

from psycopg import errors as pg
from psycopg import sql
from pydantic import BaseModel

from outwake._statement import Statement
from outwake.app.api import cursor
from outwake.app.api.answer import Page
from outwake.app.api.models import PromptCreate, PromptQuery, SessionCreate, SessionPatch, SessionQuery
from outwake.app.api.problems import Problem
from outwake.app.auth.identity import Identity
from outwake.app.connection import Row
from outwake.app.context import Context
from outwake.schema import in_schema
from outwake.session.names import BIDI

PROMPTS = 100  # shown with a session
PAGE_BYTES = 1_000_000  # of the answer's prompts; the last prompt of a page may go beyond
SESSION_RETRY = 30  # seconds, because a turn takes minutes
_NO_WORD = re.compile(r"[^a-z0-9]+")

# One statement, so the session, prompt, outbox row and idempotency key commit together or not at all.
# `new` is empty if the user may not see the parent; session_create is not called then.
_CREATE = Statement(
    in_schema("""
WITH new AS MATERIALIZED (
    SELECT :schema.uuid_v7() AS id, now() AS at
    WHERE %(parent)s::uuid IS NULL
       OR EXISTS (
           SELECT FROM :schema.session AS p
           WHERE p.id = %(parent)s AND (%(scope)s::text IS NULL OR p.user_id = %(scope)s))
)
SELECT c.outcome, c.answer ->> 'id', c.answer::text
FROM new
CROSS JOIN LATERAL :schema.session_create(
    of_id => new.id,
    of_user => %(user_id)s::text,
    of_repo => %(repo)s::text,
    of_target_branch => %(target_branch)s::text,
    of_branch => coalesce(%(branch)s::text, %(branch_stem)s::text || right(new.id::text, 8)),
    of_title => %(title)s::text,
    of_parent => %(parent)s::uuid,
    of_callback_url => %(callback_url)s::text,
    moment => new.at,
    prompt_text => %(prompt)s::text,
    worker_present => %(worker_present)s::boolean,
    idempotency_key => %(key)s::text,
    request_hash => %(request_hash)s::bytea,
    trace => %(trace)s::text,
    most_sessions => %(most_sessions)s::integer
) AS c
""")
)

_CREATE_PROMPT = Statement(
    in_schema("""
SELECT outcome, answer::text
FROM :schema.prompt_create(
    %(id)s::uuid, %(scope)s::text, %(prompt)s::text, %(worker_present)s::boolean,
    %(key)s::text, %(request_hash)s::bytea, %(trace)s::text, %(user_id)s::text, %(most_sessions)s::integer)
""")
)

# Prompt by prompt from the newest back, as messages.py reads messages. `place` 0 is where the page begins.
# `retrying` tells the owner of a turn that failed why, and when it is tried again.
_PROMPTS = """
failing AS MATERIALIZED (
    SELECT o.payload ->> 'prompt_id' AS prompt_id, jsonb_build_object(
        'failures', o.failures, 'max_attempts', o.max_attempts,
        'error', left(o.errors -> -1 ->> 'error', 4000),
        'next_try_at', CASE o.state WHEN 'ready' THEN o.available_at END) AS retrying
    FROM :schema.outbox AS o
    WHERE o.topic = 'session.run' AND o.payload ->> 'session_id' = %(id)s::text
      AND o.state IN ('ready', 'running') AND o.failures > 0
),
page (place, created_at, id, text, bytes) AS (
    SELECT 0, %(at)s::timestamptz, %(key)s::uuid, NULL::text, 0::bigint
    UNION ALL
    SELECT p.place + 1, next.created_at, next.id, next.text, p.bytes + octet_length(next.text)
    FROM page AS p
    CROSS JOIN LATERAL (
        SELECT q.created_at, q.id, (:schema.prompt_json(q) || jsonb_build_object('retrying', (
            SELECT f.retrying FROM failing AS f WHERE f.prompt_id = q.id::text LIMIT 1)))::text AS text
        FROM :schema.prompt AS q
        WHERE q.session_id = %(id)s::uuid AND (q.created_at, q.id) < (p.created_at, p.id)
          AND (%(ids)s::uuid[] IS NULL OR q.id = ANY (%(ids)s))
        ORDER BY q.created_at DESC, q.id DESC
        LIMIT 1
    ) AS next
    WHERE p.place < %(rows)s AND p.bytes < %(page_bytes)s
)
"""
_SHOW = in_schema(f"""
WITH RECURSIVE {_PROMPTS}
SELECT
    (SELECT coalesce(array_agg(p.text ORDER BY p.place) FILTER (WHERE p.place > 0), '{{}}') FROM page AS p),
    CASE WHEN last.more THEN last.created_at END, last.id,
    (:schema.session_json(s) || jsonb_build_object('worker_present', %(worker_present)s::boolean))::text
FROM :schema.session AS s
CROSS JOIN LATERAL (
    SELECT p.created_at, p.id, EXISTS (
        SELECT FROM :schema.prompt AS q
        WHERE q.session_id = s.id AND (q.created_at, q.id) < (p.created_at, p.id)) AS more
    FROM page AS p ORDER BY p.place DESC LIMIT 1
) AS last
WHERE s.id = %(id)s::uuid AND (%(scope)s::text IS NULL OR s.user_id = %(scope)s)
""")  # noqa: S608

_LIST = sql.SQL(
    in_schema("""
SELECT :schema.session_json(s)::text, s.created_at, s.id
FROM :schema.session AS s
WHERE {conditions}
ORDER BY s.created_at DESC, s.id DESC
LIMIT %(rows)s
""")
)
# A query has only the conditions that apply, so that each combination gets its own plan.
_CONDITIONS = {
    "scope": sql.SQL("s.user_id = %(scope)s"),
    "at": sql.SQL("(s.created_at, s.id) < (%(at)s, %(key)s)"),
    "inbox_status": sql.SQL("s.inbox_status = %(inbox_status)s"),
    "session_status": sql.SQL("s.session_status = %(session_status)s"),
    "repo": sql.SQL("s.repo = %(repo)s"),
}

_CANCEL = in_schema("""
SELECT c.cancelled, c.cancelling
FROM :schema.session AS s CROSS JOIN LATERAL :schema.session_cancel(s.id) AS c
WHERE s.id = %(id)s::uuid AND (%(scope)s::text IS NULL OR s.user_id = %(scope)s)
""")

_ARCHIVE = in_schema("""
SELECT :schema.session_archive(s.id)
FROM :schema.session AS s
WHERE s.id = %(id)s::uuid AND (%(scope)s::text IS NULL OR s.user_id = %(scope)s)
""")

_RENAME = in_schema("""
WITH found AS (
    SELECT s.id FROM :schema.session AS s
    WHERE s.id = %(id)s::uuid AND (%(scope)s::text IS NULL OR s.user_id = %(scope)s)
),
renamed AS (
    UPDATE :schema.session AS s
    SET title = %(title)s, updated_at = clock_timestamp()
    FROM found AS f
    WHERE s.id = f.id AND s.session_status = 'active'
    RETURNING :schema.session_json(s)::text AS answer
)
SELECT (SELECT r.answer FROM renamed AS r) FROM found
""")


class Created(NamedTuple):
    """A new session or turn. `replayed`: an earlier request with this key made it."""

    session_id: str
    answer: str
    replayed: bool


class CancelledTurns(NamedTuple):
    """How many turns ended at once, and how many a worker has yet to stop."""

    cancelled: int
    cancelling: int


async def create_session(
    here: Context, identity: Identity, asked: SessionCreate, *, key: str | None, trace: str | None
) -> Created:
    """`key` is the client's Idempotency-Key, `trace` a traceparent.

    Raises Problem (invalid, branch-taken, key-reused, too-many-sessions, unavailable).
    """
    title = asked.title or _first_line(asked.prompt or "") or asked.repo[-200:]
    values = {
        **vars(asked),
        "title": title,
        "branch_stem": f"outwake/{_slug(title) or _slug(asked.repo) or 'session'}-",
        "user_id": identity.user_id,
        "scope": identity.scope,
        "worker_present": await here.presence.present(),
        "key": key,
        "request_hash": _hash("POST /sessions", asked) if key else None,
        "trace": trace,
        "most_sessions": None if identity.operator else here.settings.max_sessions,
    }
    for attempt in range(3):
        try:
            row = await here.database.row(_CREATE, values)
            break
        except pg.UniqueViolation as error:
            if error.diag.constraint_name != "session_branch_of_repo":
                raise
            if asked.branch is None and attempt < 2:
                continue  # the generated branch name is taken; retry with a new id
            raise Problem(
                "branch-taken", "An active session of this repository has this branch; name another."
            ) from None
        except pg.ForeignKeyViolation:  # the parent was deleted meanwhile
            row = None
            break
    if row is None:
        wrong = {"pointer": "#/parent", "detail": "there is no such session"}
        raise Problem("invalid", "1 field cannot be accepted.", errors=[wrong])
    outcome, session_id, answer = row
    _check_outcome(outcome)
    here.stuck.work_came()
    return Created(session_id, answer, outcome == "replayed")


async def create_prompt(
    here: Context,
    identity: Identity,
    session_id: UUID,
    asked: PromptCreate,
    *,
    key: str | None,
    trace: str | None,
) -> Created:
    """Raises Problem (not-found, archived, session-full, key-reused, too-many-sessions, unavailable)."""
    values = {
        "id": session_id,
        "scope": identity.scope,
        "prompt": asked.prompt,
        "worker_present": await here.presence.present(),
        "key": key,
        "request_hash": _hash(f"POST /sessions/{session_id}/prompts", asked) if key else None,
        "trace": trace,
        "user_id": identity.user_id,
        "most_sessions": None if identity.operator else here.settings.max_sessions,
    }
    try:
        row = await here.database.row(_CREATE_PROMPT, values)
    except pg.UniqueViolation:
        # A concurrent request for another session used the same key. It has committed: now the key is found.
        row = await here.database.row(_CREATE_PROMPT, values)
    assert row is not None
    outcome, answer = row
    if outcome == "missing":
        raise no_session()
    if outcome == "archived":
        raise archived()
    if outcome == "limited" and answer is not None:
        raise Problem("session-full", "Continue in a new session: name this one as its parent.")
    _check_outcome(outcome)
    here.stuck.work_came()
    return Created(str(session_id), answer, outcome == "replayed")


async def list_sessions(here: Context, identity: Identity, asked: SessionQuery) -> Page[str]:
    """Newest first. Raises Problem (invalid, unavailable)."""
    at, key = cursor.decode(asked.cursor, cursor.uuid)
    values: dict[str, Any] = {
        **asked.model_dump(),
        "session_status": None if asked.session_status == "any" else asked.session_status,
        "scope": identity.scope,
        "at": at,
        "key": key,
        "rows": asked.limit + 1,
    }
    if asked.inbox_status == "archived" and "session_status" not in asked.model_fields_set:
        values["session_status"] = None
    applying = [text for name, text in _CONDITIONS.items() if values[name] is not None]
    query = _LIST.format(conditions=sql.SQL(" AND ").join(applying or [sql.SQL("true")]))
    return cursor.page(await here.database.rows(query, values), asked.limit)


async def show_session(here: Context, identity: Identity, session_id: UUID) -> str:
    """The session with its newest prompts, in order. Raises Problem (not-found, unavailable)."""
    shown, page = await _read(here, identity, session_id, PromptQuery(limit=PROMPTS))
    prompts = ", ".join(reversed(page.items))
    return f'{shown[:-1]}, "prompts": [{prompts}], "prompts_next": {json.dumps(page.next)}}}'


async def list_prompts(
    here: Context,
    identity: Identity,
    session_id: UUID,
    asked: PromptQuery,
    ids: Sequence[UUID] | None = None,
) -> Page[str]:
    """Newest first; only those of `ids`, if given. Raises Problem (not-found, invalid, unavailable)."""
    return (await _read(here, identity, session_id, asked, ids))[1]


async def _read(
    here: Context,
    identity: Identity,
    session_id: UUID,
    asked: PromptQuery,
    ids: Sequence[UUID] | None = None,
) -> tuple[str, Page[str]]:
    """The session without its prompts, and a page of these."""
    at, key = cursor.decode(asked.cursor, cursor.uuid)
    values = {
        "id": session_id,
        "scope": identity.scope,
        "worker_present": await here.presence.present(),
        "at": at or "infinity",
        "key": key,
        "ids": list(ids) if ids is not None else None,
        "rows": asked.limit,
        "page_bytes": PAGE_BYTES,
    }
    prompts, last_at, last_key, session = await _found(here, _SHOW, values)
    return session, Page(prompts, cursor.encode(last_at, last_key) if last_at else None)


async def rename_session(here: Context, identity: Identity, session_id: UUID, asked: SessionPatch) -> str:
    """The session as it is now. Raises Problem (not-found, archived, unavailable)."""
    values = {"id": session_id, "scope": identity.scope, "title": asked.title}
    answer = (await _found(here, _RENAME, values))[0]
    if answer is None:
        raise archived()
    return str(answer)


async def archive_session(here: Context, identity: Identity, session_id: UUID) -> None:
    """Cancel the session's turns and archive it. Raises Problem (not-found, unavailable)."""
    await _found(here, _ARCHIVE, {"id": session_id, "scope": identity.scope})


async def cancel_session(here: Context, identity: Identity, session_id: UUID) -> CancelledTurns:
    """Cancel the session's turns. Raises Problem (not-found, unavailable)."""
    return CancelledTurns(*await _found(here, _CANCEL, {"id": session_id, "scope": identity.scope}))


async def _found(here: Context, query: LiteralString, values: dict[str, Any]) -> Row:
    """The one row of a query that has none if this user may not see the session."""
    row = await here.database.row(query, values)
    if row is None:
        raise no_session()
    return row


def no_session() -> Problem:
    return Problem("not-found", "There is no such session.")


def archived() -> Problem:
    return Problem("archived", "An archived session can only be read.")


def _check_outcome(outcome: str) -> None:
    if outcome == "mismatch":
        raise Problem("key-reused", "Use a new key for a new request.")
    if outcome == "limited":
        raise Problem(
            "too-many-sessions",
            "You have as many unfinished sessions as you may; wait for one, or cancel it.",
            headers={"Retry-After": str(SESSION_RETRY)},
        )


def _hash(target: str, asked: BaseModel) -> bytes:
    """The hash of the request's content. The order and spacing of its JSON do not matter."""
    content = asked.model_dump(mode="json", exclude_none=True)
    return hashlib.sha256(json.dumps([target, content], sort_keys=True).encode()).digest()


def _first_line(prompt: str) -> str:
    """The first line that has text, made fit for a title. Empty if there is none."""
    for line in prompt[:10_000].splitlines():
        if not line.isprintable():
            line = "".join(
                c for c in line if c not in BIDI and unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp")
            )
        words = " ".join(line.split())
        if words:
            return words if len(words) <= 80 else words[:79].rstrip() + "…"
    return ""


def _slug(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return _NO_WORD.sub("-", plain)[:40].strip("-")
