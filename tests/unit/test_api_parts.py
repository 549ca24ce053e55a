"""Parts of the API that need no server: names made up for a session, cursors, hosts, settings."""

from datetime import UTC, datetime
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outwake.app.api import cursor
from outwake.app.api.problems import Problem
from outwake.app.api.sessions import _first_line, _slug
from outwake.app.auth.identity import check_host, is_loopback
from outwake.app.main import create_app
from outwake.errors import ConfigurationError
from outwake.session.names import check_branch, check_title
from outwake.settings import Settings

UUIDS = st.uuids()
TIMES = st.datetimes(timezones=st.just(UTC))
IDS = st.integers(1, 2**63 - 1)


@given(st.text())
def test_title_made_of_a_prompt_is_a_title(prompt: str) -> None:
    title = _first_line(prompt)
    if title:
        check_title(title)
        assert len(title) <= 80


@given(st.text())
def test_branch_made_of_a_title_is_a_branch(title: str) -> None:
    check_branch(f"outwake/{_slug(title) or 'session'}-0123abcd")


@pytest.mark.parametrize(
    ("title", "slug"),
    [
        ("Fix the bug", "fix-the-bug"),
        ("Ünïcode & more!", "unicode-more"),
        ("日本", ""),
        ("a" * 60, "a" * 40),
        ("a" * 39 + " b", "a" * 39),
    ],
)
def test_slug(title: str, slug: str) -> None:
    assert _slug(title) == slug


@given(TIMES, UUIDS, IDS)
def test_cursor_comes_back_as_it_was(at: datetime, session: UUID, row: int) -> None:
    assert cursor.decode(cursor.encode(at, session), cursor.uuid) == (at, session)
    assert cursor.decode(cursor.encode(at, row), cursor.row_id) == (at, row)


@given(st.text(max_size=200))
def test_cursor_that_is_none_is_a_problem(text: str) -> None:
    with pytest.raises(Problem):
        cursor.decode(text, cursor.uuid)


@pytest.mark.parametrize("host", ["localhost", "a.localhost", "127.0.0.1", "127.8.8.8", "::1"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::", "localhost.example", "127.0.0.1.example", "10.0.0.1"])
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)


def settings(**changes: object) -> Settings:
    return Settings.model_validate({"DATABASE_URL": "postgresql://127.0.0.1/x", **changes})


def test_other_hosts_need_an_explicit_wish() -> None:
    check_host(settings(OUTWAKE_HOST="::1"))
    check_host(settings(OUTWAKE_HOST="0.0.0.0", OUTWAKE_DEV_IDENTITY="1"))
    with pytest.raises(ConfigurationError, match="OUTWAKE_DEV_IDENTITY"):
        create_app(settings(OUTWAKE_HOST="0.0.0.0"))
