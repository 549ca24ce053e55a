"""The floor: the loop that one writes by hand. LISTEN, a statement trigger that notifies, a claim of a
batch by FOR UPDATE SKIP LOCKED, a completion of a batch; two commits a batch. Rows are kept; nothing is
fenced, retried, rescued or ordered.
"""

import signal
import sys

import common
import psycopg

SCHEMA = """
CREATE TABLE job (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    topic text NOT NULL,
    payload jsonb NOT NULL DEFAULT '{}',
    state text NOT NULL DEFAULT 'ready',
    available_at timestamptz NOT NULL DEFAULT now(),
    attempt integer NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL DEFAULT now(),
    started_at timestamptz,
    finished_at timestamptz
);
CREATE INDEX job_ready ON job (available_at, id) WHERE state = 'ready';
CREATE FUNCTION job_notify() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN PERFORM pg_notify(''job'', ''''); RETURN NULL; END';
CREATE TRIGGER job_notify AFTER INSERT ON job FOR EACH STATEMENT EXECUTE FUNCTION job_notify();
"""
CLAIM = """
UPDATE job AS j SET state = 'running', attempt = attempt + 1, started_at = clock_timestamp()
FROM (
    SELECT id FROM job WHERE state = 'ready' AND available_at <= now()
    ORDER BY available_at, id LIMIT %s FOR UPDATE SKIP LOCKED
) AS s
WHERE j.id = s.id RETURNING j.id, j.payload
"""
COMPLETE = "UPDATE job SET state = 'done', finished_at = clock_timestamp() WHERE id = ANY(%s)"
INSERT = "INSERT INTO job (topic) VALUES ('noop')"


async def setup() -> None:
    with psycopg.connect(common.URL, autocommit=True) as conn:
        conn.execute(SCHEMA)


async def fill(count: int) -> None:
    with psycopg.connect(common.URL, autocommit=True) as conn:
        conn.execute("INSERT INTO job (topic) SELECT 'noop' FROM generate_series(1, %s)", (count,))


async def work(variant: str) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    batch = int(variant.removeprefix("b"))
    conn = psycopg.connect(common.URL, autocommit=True, prepare_threshold=1)
    listener = psycopg.connect(common.URL, autocommit=True)
    listener.execute("LISTEN job")
    while True:
        while rows := conn.execute(CLAIM, (batch,)).fetchall():
            for _ in rows:
                common.mark()
            conn.execute(COMPLETE, ([row[0] for row in rows],))
        for _ in listener.notifies(stop_after=1):
            pass


async def enqueue() -> None:
    conn = await psycopg.AsyncConnection.connect(common.URL, autocommit=True)
    await common.produce(lambda: conn.execute(INSERT))


if __name__ == "__main__":
    common.main(setup, fill, work, enqueue)
