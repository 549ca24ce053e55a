"""What OUTWAKE_RELAY_… may say. The worker's refusals are in tests/integration/test_relay.py."""

import pytest

from outwake.errors import ConfigurationError
from outwake.session.names import InvalidNameError, check_topics
from outwake.settings import load

SECRET = "s3cr3t"


@pytest.fixture(autouse=True)
def _database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://nowhere/x")


@pytest.mark.parametrize(
    ("text", "topics"),
    [
        ("", ()),
        (" , ", ()),
        ("billing.paid", ("billing.paid",)),
        (" b , a_1-x.y,b", ("b", "a_1-x.y")),
        ("a" * 100, ("a" * 100,)),
    ],
)
def test_topics(text: str, topics: tuple[str, ...]) -> None:
    assert check_topics(text) == topics


@pytest.mark.parametrize(
    "text", ["billing.*", "a,billing.>", "A", "1a", "a.", "a..b", "a b", "a\nb", "a" * 101]
)
def test_what_no_subject_can_be_made_from(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidNameError):
        check_topics(text)
    monkeypatch.setenv("OUTWAKE_RELAY_TOPICS", text)
    with pytest.raises(ConfigurationError, match=r"^OUTWAKE_RELAY_TOPICS: "):
        load()


@pytest.mark.parametrize(
    "url",
    [
        "nats://h",
        "tls://h:4222",
        "nats://u:p@h:1/",
        "nats://token@[::1]:4222",
        "nats://a:4222, nats://b:4222",
    ],
)
def test_servers(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTWAKE_RELAY_URL", url)
    settings = load()
    assert settings.relay_url is not None
    assert settings.relay_url.get_secret_value() == url
    assert url not in repr(settings)


def test_an_empty_url_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTWAKE_RELAY_URL", "")
    assert load().relay_url is None


@pytest.mark.parametrize(
    "url",
    [
        f"http://{SECRET}@h:4222",
        f"{SECRET}@h:4222",
        f"nats://{SECRET}@",
        f"nats://{SECRET}@h:x",
        f"nats://{SECRET}@h:70000",
        f"nats://{SECRET}@h/path",
        f"nats://{SECRET}@h,,",
        f"ws://{SECRET}@h",
        f"nats://{SECRET}#x@h",
    ],
)
def test_a_wrong_server_is_refused_and_not_repeated(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTWAKE_RELAY_URL", url)
    with pytest.raises(ConfigurationError, match=r"^OUTWAKE_RELAY_URL: .*must be nats://") as refused:
        load()
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("prefix", [".", "a.", "a b", "a.*", ">", "$JS.API"])
def test_a_prefix_that_is_no_subject_is_refused(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTWAKE_RELAY_PREFIX", prefix)
    with pytest.raises(ConfigurationError, match=r"^OUTWAKE_RELAY_PREFIX: "):
        load()
