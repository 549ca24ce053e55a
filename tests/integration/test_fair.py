"""Users take turns: one user's many sessions do not make another wait for all of them (fair.sql).

What is counted is the order in which rows are claimed.
"""

from uuid import UUID, uuid4

import pytest

from tests.conftest import Connect
from tests.support.plans import explain
from tests.support.steps import Connection, Rule, add, column, new_worker, one, take_out, with_and_without

CREATE = """
SELECT session_create(
    %s, %s, 'octo/tools', 'main', %s, 't', NULL, NULL, now(), 'x', true, NULL, NULL, NULL, 1000)
"""
CLAIM = """
SELECT s.user_id FROM outbox_claim(%s, '{session.run}', %s, '10 min') AS c
JOIN session AS s ON s.id = (c.payload ->> 'session_id')::uuid ORDER BY c.priority DESC, c.available_at
"""
RUNNING = "SELECT id FROM outbox WHERE state = 'running' ORDER BY started_at, id LIMIT 1"


async def create(conn: Connection, user: str, count: int = 1) -> list[UUID]:
    ids = [uuid4() for _ in range(count)]
    for session in ids:
        await conn.execute(CREATE, (session, user, f"b-{session}"))
    return ids


async def end_first(conn: Connection, worker: UUID, state: str = "done") -> None:
    """Of the rows that run, the one that was claimed first ends."""
    row = await one(conn, RUNNING)
    await conn.execute("UPDATE outbox SET state = %s WHERE id = %s", (state, row))


async def drained(conn: Connection, slots: int, already: list[str] | None = None) -> list[str]:
    """Whose rows a worker of so many slots runs, in order, if the first that began always ends first."""
    worker = await new_worker(conn, "session.run")
    order = already or await column(conn, CLAIM, worker, slots)
    while await one(conn, RUNNING):
        await end_first(conn, worker)
        order += await column(conn, CLAIM, worker, 1)
    return order


@with_and_without
@pytest.mark.parametrize("slots", [1, 3, 10])
async def test_a_user_waits_for_one_turn_of_another_and_not_for_all(
    rule: Rule, slots: int, connect: Connect
) -> None:
    """1. Bob creates 40 sessions, and some run. 2. Alice creates three, Carol one. Taken out: the rank."""
    conn = await connect()
    if rule == "taken out":
        rank = "CASE WHEN others IS NULL THEN session_rank(of_user, of_id) ELSE least(others, 9) END"
        await take_out(conn, "session_create", rank, "0")
    await create(conn, "bob", 40)
    first = await column(conn, CLAIM, await new_worker(conn, "session.run"), slots)
    assert first == ["bob"] * slots
    await create(conn, "alice", 3)
    await create(conn, "carol")
    order = await drained(conn, slots, first)
    assert sorted(order) == sorted(["bob"] * 40 + ["alice"] * 3 + ["carol"])
    later = order[slots:]
    if rule == "taken out":
        assert later.index("alice") >= 40 - slots
    else:
        assert later.index("alice") <= 1
        assert later.index("carol") <= 3
        assert [n for n, user in enumerate(later) if user == "alice"][-1] <= 8


@pytest.mark.parametrize("limit", ["1000", "NULL"])
async def test_a_session_has_the_rank_that_it_has_among_its_users(limit: str, connect: Connect) -> None:
    """Also where the operator limits nobody's sessions: they are not counted for a limit then."""
    conn = await connect()
    for n in range(12):
        await conn.execute(CREATE.replace("1000", limit), (uuid4(), "bob", f"b{n}"))
    ranks = await column(conn, "SELECT -priority FROM outbox ORDER BY id")
    assert ranks == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9]


@pytest.mark.parametrize("slots", [1, 5])
async def test_users_with_as_much_to_do_take_turns(slots: int, connect: Connect) -> None:
    """Of each stretch of the order every user has a third, though one came first with all of his."""
    conn = await connect()
    for user in ("bob", "alice", "carol"):
        await create(conn, user, 15)
    order = await drained(conn, slots)
    for begin in range(0, 36, 9):
        counts = {user: order[begin : begin + 9].count(user) for user in ("bob", "alice", "carol")}
        assert min(counts.values()) >= 2, (begin, order)


async def test_one_user_alone_has_all_slots_and_his_order(connect: Connect) -> None:
    conn = await connect()
    ids = await create(conn, "bob", 25)
    worker = await new_worker(conn, "session.run")
    query = "SELECT (payload ->> 'session_id')::uuid FROM outbox_claim(%s, '{session.run}', %s, '10 min')"
    ran = await column(conn, query, worker, 20)
    assert len(ran) == 20
    while await one(conn, RUNNING):
        await end_first(conn, worker)
        ran += await column(conn, query, worker, 20)
    assert set(ran[:20]) == set(ids[:20])
    assert ran[20:] == ids[20:]


@pytest.mark.parametrize("state", ["done", "dead", "cancelled"])
async def test_however_a_row_ends_the_next_of_its_user_moves_up(state: str, connect: Connect) -> None:
    conn = await connect()
    worker = await new_worker(conn, "session.run")
    await create(conn, "bob", 3)
    await column(conn, CLAIM, worker, 1)
    assert await column(conn, "SELECT priority FROM outbox ORDER BY id") == [0, -1, -2]
    await end_first(conn, worker, state)
    query = "SELECT priority FROM outbox WHERE state = 'ready' ORDER BY id"
    assert await column(conn, query) == [0, -2]
    await conn.execute("DELETE FROM outbox WHERE state = 'ready' AND priority = 0")
    assert await column(conn, query) == [0]


async def test_a_row_whose_time_has_not_come_does_not_move_up(connect: Connect) -> None:
    """A retry keeps its backoff."""
    conn = await connect()
    worker = await new_worker(conn, "session.run")
    await create(conn, "bob", 3)
    await column(conn, CLAIM, worker, 1)
    await conn.execute(
        "UPDATE outbox SET available_at = now() + interval '1 hour' WHERE state = 'ready' AND priority = -1"
    )
    await end_first(conn, worker)
    query = "SELECT priority, available_at > now() FROM outbox WHERE state = 'ready' ORDER BY id"
    assert await (await conn.execute(query)).fetchall() == [(-1, True), (0, False)]


async def test_a_follow_up_has_the_rank_of_its_session(connect: Connect) -> None:
    conn = await connect()
    first, *_ = await create(conn, "bob", 4)
    other = (await create(conn, "alice"))[0]
    for session in (first, other):
        await conn.execute("SELECT prompt_create(%s, NULL, 'more', true)", (session,))
    query = "SELECT priority FROM outbox WHERE ordering_key = 'session:' || %s::text ORDER BY id"
    assert await column(conn, query, first) == [0, -3]
    assert await column(conn, query, other) == [0, 0]


async def test_of_many_users_rows_few_are_read(connect: Connect) -> None:
    """To create a session, and to end a turn: what belongs to its user. A claim descends once a rank."""
    conn = await connect()
    await conn.execute(
        """
        INSERT INTO session (id, user_id, repo, target_branch, branch, title)
        SELECT md5(n::text)::uuid, 'user' || n / 20, 'octo/tools', 'main', 'b' || n, 't'
        FROM generate_series(1, 20000) AS n;
        INSERT INTO outbox (topic, ordering_key, payload, priority)
        SELECT 'session.run', 'session:' || md5(n::text)::uuid,
               jsonb_build_object('session_id', md5(n::text)), -least(n % 20, 9)
        FROM generate_series(1, 20000) AS n
        """
    )
    await conn.execute("VACUUM ANALYZE outbox, session")
    worker = await new_worker(conn, "session.run")
    for turn in range(4):
        created = await explain(conn, CREATE, uuid4(), "user7", f"new{turn}")
        claimed = await explain(conn, "SELECT * FROM outbox_claim(%s, '{session.run}', 1, '10 min')", worker)
        row = await one(conn, RUNNING)
        ended = await explain(conn, "SELECT outbox_complete(%s, ARRAY[%s::bigint], '{1}')", worker, row)
        for plans in (created, claimed, ended):
            assert not plans.read_in_full()
            assert turn == 0 or plans.buffers() < 500, plans.buffers()  # the first reads catalogs


async def test_rows_of_other_topics_have_the_priority_they_were_given(connect: Connect) -> None:
    conn = await connect()
    await create(conn, "bob", 3)
    await add(conn, "t")
    assert await column(conn, "SELECT priority FROM outbox WHERE topic = 't'") == [0]
