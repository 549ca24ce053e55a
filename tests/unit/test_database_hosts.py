"""Which host is tried first, what a replaced server is, and what is an outage of all hosts."""

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from outwake import _hosts
from outwake._hosts import Origin, in_order, is_behind
from outwake.connect import is_outage


@pytest.fixture(autouse=True)
def nothing_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_hosts, "_answered", {})
    monkeypatch.setattr(_hosts, "_newest", {})


def hosts(url: str) -> list[tuple[str, str]]:
    found = conninfo_to_dict(in_order(url))
    return list(zip(str(found["host"]).split(","), str(found.get("port", "")).split(","), strict=False))


def test_the_host_that_answered_is_tried_first() -> None:
    url = "postgresql://a:1,b:2,c:3/x"
    assert hosts(url) == [("a", "1"), ("b", "2"), ("c", "3")]
    _hosts.answered(url, "b", 2)
    assert hosts(url) == [("b", "2"), ("a", "1"), ("c", "3")]
    _hosts.answered(url, "c", 3)
    assert hosts(url) == [("c", "3"), ("b", "2"), ("a", "1")]
    _hosts.answered(url, "c", 3, well=False)
    assert hosts(url) == [("b", "2"), ("a", "1"), ("c", "3")]
    assert hosts("postgresql://d:1,b:2/x") == [("d", "1"), ("b", "2")]


@pytest.mark.parametrize("url", ["postgresql://a/x", "host=/tmp dbname=x", "dbname=x", "postgresql://a,b/x"])
def test_an_unknown_order_is_the_urls(url: str) -> None:
    assert in_order(url) == url


def test_one_port_is_for_all_hosts() -> None:
    url = "host=a,b port=7 dbname=x"
    _hosts.answered(url, "b", 7)
    found = conninfo_to_dict(in_order(url))
    assert (found["host"], found["port"]) == ("b,a", "7")


def test_a_server_is_behind_if_its_cluster_has_a_newer_timeline() -> None:
    assert not is_behind(Origin("1", 1))
    assert not is_behind(Origin("1", 2))
    assert is_behind(Origin("1", 1))
    assert not is_behind(Origin("2", 1))
    assert not is_behind(Origin(None, None))


def several(*failures: str) -> str:
    lines = [f"- host: 'h', port: '1', hostaddr: '::1': {failure}" for failure in failures]
    return "\n".join([failures[-1], "Multiple connection attempts failed. All failures were:", *lines])


REFUSED = "connection failed: connection to server at 127.0.0.1 failed: Connection refused\n\tIs it running?"
READ_ONLY = "connection failed: connection to server at 127.0.0.1 failed: session is read-only"


@pytest.mark.parametrize(
    ("text", "outage"),
    [
        (REFUSED, True),
        (READ_ONLY, True),
        ("FATAL:  the database system is starting up", True),
        ("connection timeout expired", False),
        (several(REFUSED, READ_ONLY), True),
        (several(REFUSED, "connection timeout expired"), False),
        (several("connection timeout expired", REFUSED), False),
    ],
)
def test_an_outage_is_what_every_host_says(text: str, outage: bool) -> None:
    """A host that is silent may be the one that all others use."""
    assert is_outage(psycopg.OperationalError(text)) is outage
