"""The bare route: what `POST /sessions` is compared to. One Starlette route that does the same three inserts
in one transaction, one round trip each way, and nothing else: no authentication, no validation.
"""

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

from psycopg_pool import AsyncConnectionPool
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from outwake.schema import in_schema

INSERT = in_schema("""
WITH s AS (
    INSERT INTO :schema.session (id, user_id, repo, target_branch, branch, title)
    VALUES (%s, 'local', %s, 'main', %s, 'bench')
    RETURNING id
), p AS (
    INSERT INTO :schema.prompt (session_id, text) SELECT id, %s FROM s RETURNING id, session_id
)
INSERT INTO :schema.outbox (topic, ordering_key, payload)
SELECT 'session.run', 'session:' || session_id, jsonb_build_object('session_id', session_id, 'prompt_id', id)
FROM p
""")
pool: AsyncConnectionPool = AsyncConnectionPool(
    os.environ["DATABASE_URL"], kwargs={"autocommit": True, "prepare_threshold": 1}, min_size=10, open=False
)


async def create(request: Request) -> Response:
    body = json.loads(await request.body())
    session = uuid4()
    async with pool.connection() as conn:
        # The CTE's foreign keys are checked at the end of the statement.
        await conn.execute(INSERT, (session, body["repo"], f"bench/{session}", body["prompt"]))
    return Response(json.dumps({"id": str(session)}), 201, media_type="application/json")


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    async with pool:
        yield


app = Starlette(routes=[Route("/sessions", create, methods=["POST"])], lifespan=lifespan)
