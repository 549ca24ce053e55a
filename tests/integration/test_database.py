"""The fixtures: a migrated database for each test, on whichever server the run has."""

from tests.conftest import Connect


async def test_the_database_is_migrated_and_empty_and_not_the_template(
    connect: Connect, database: str, template: str
) -> None:
    connection = await connect()
    row = await (
        await connection.execute("SELECT current_database(), (SELECT count(*) FROM outbox)")
    ).fetchone()
    assert row is not None
    name, rows = row
    assert name == database.rpartition("/")[2]
    assert name != template
    assert rows == 0


async def test_an_empty_database_has_no_tables(connect: Connect, empty_database: str) -> None:
    connection = await connect(empty_database)
    assert connection.autocommit
    query = "SELECT 1 FROM pg_class WHERE relnamespace = 'public'::regnamespace"
    assert await (await connection.execute(query)).fetchall() == []
    schema = "SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_|^information_schema$'"
    assert await (await connection.execute(schema)).fetchall() == [("public",)]
