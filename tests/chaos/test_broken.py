"""Each rule that `--break` takes out is still where it is looked for."""

import psycopg
import pytest

from tests.chaos.broken import BREAKS, break_rule


@pytest.mark.parametrize("name", BREAKS)
def test_rule_is_found_and_can_be_broken(name: str, database: str) -> None:
    with psycopg.connect(database, autocommit=True) as conn:
        break_rule(conn, name)
