"""Secrets are hidden however they are spelled, and nothing else is changed."""

import base64
import json
from pathlib import Path

import pytest

from outwake.settings import load
from outwake.worker.errors import TransientError
from outwake.worker.repo.credentials import load_credentials, secrets_in
from outwake.worker.secrets import Secrets


def test_a_secret_is_hidden_in_every_spelling() -> None:
    secrets = Secrets(['p@ss"word/1'])
    said = 'plain p@ss"word/1, in a URL p%40ss%22word%2F1, in JSON "p@ss\\"word/1"'
    assert secrets.text(said) == 'plain ***, in a URL ***, in JSON "***"'


def test_an_event_keeps_its_shape() -> None:
    secrets = Secrets(['two"words'])
    event = {"type": "x", "deep": [{'key two"words': 'a two"words b', "number": 1.5, "none": None}]}
    hidden, spelled = secrets.line(event)
    assert hidden == {"type": "x", "deep": [{"key ***": "a *** b", "number": 1.5, "none": None}]}
    assert json.loads(spelled) == hidden
    untouched = {"type": "x"}
    assert secrets.line(untouched)[0] is untouched


def test_a_part_of_an_escape_is_not_taken_for_a_secret() -> None:
    """The line break is spelled \\n in JSON, and the secret begins with an n."""
    line, spelled = Secrets(["nothing-to-see"]).line({"text": "\nothing-to-see"})
    assert line == json.loads(spelled) == {"text": "\nothing-to-see"}


def test_every_part_of_a_setting_is_hidden_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = ("whsec_" + base64.b64encode(bytes([n]) * 24).decode() for n in (1, 2))
    monkeypatch.setenv("OUTWAKE_DATABASE_URL", "postgresql+psycopg://shop:p%40ss-word@db/x")
    monkeypatch.setenv("OUTWAKE_LISTEN_DATABASE_URL", "host=db user=shop password='other-word'")
    monkeypatch.setenv("OUTWAKE_WEBHOOK_SECRET", f"{first} {second}")
    monkeypatch.setenv("OUTWAKE_RELAY_URL", "nats://me:relay-word@one:4222,nats://only-token@two:4222")
    secrets = Secrets.of_environment() | load().secrets
    known = ["p@ss-word", "p%40ss-word", "other-word", first, second, "relay-word", "only-token"]
    known += [first.removeprefix("whsec_"), second.removeprefix("whsec_")]
    for secret in known:
        assert secrets.text(f"it is {secret}.") == "it is ***.", secret
        assert secret not in secrets.line({"text": f"<{secret}>"})[1]
    assert secrets.text("shop at db, one and two") == "shop at db, one and two"


def test_passwords_in_urls_of_the_environment_are_hidden() -> None:
    environment = {
        "HTTPS_PROXY": "http://user:proxy-word@proxy:3128",
        "REPO": "https://the-token@git.test/x",
        "REMOTE": "ssh://gituser@git.test/x",
        "TWO_TOKENS": "first-one second-one",
        "PG_TOKEN": "whatever",
    }
    text = "proxy-word the-token gituser second-one first-one whatever"
    assert Secrets.of_environment(environment).text(text) == "*** *** gituser *** *** ***"


def test_what_is_cut_off_is_searched_before() -> None:
    said = "x " * 10_000 + "token=" + "s" * 30 + " end"
    assert Secrets().last(said, 20) == (said[:-34] + "*** end")[-20:]


def test_variables_named_like_a_secret_are_hidden() -> None:
    environment = {"ANTHROPIC_API_KEY": "sk-ant-1234", "PATH": "/usr/bin", "SHORT_KEY": "abc"}
    assert Secrets.of_environment(environment).text("sk-ant-1234 /usr/bin abc") == "*** /usr/bin abc"


def test_more_secrets_can_be_added() -> None:
    assert (Secrets(["first-one"]) | ["second-one"]).text("first-one second-one") == "*** ***"


def test_one_file_for_everybody(tmp_path: Path) -> None:
    path = tmp_path / "credentials"
    path.write_text("https://me:the-token@git.test")
    assert load_credentials(path, "anybody") == b"https://me:the-token@git.test\n"
    assert load_credentials(None, "anybody") is None


@pytest.mark.parametrize("user", ["ann", "a/b", "..", ".", "../other", "ann@example.org", "\u00e9"])
def test_one_file_a_user(tmp_path: Path, user: str) -> None:
    home = tmp_path / "credentials"
    home.mkdir()
    (tmp_path / "other").write_text("https://me:others@git.test\n")
    assert load_credentials(home, user) is None
    names = {"ann": "ann", "a/b": "a%2Fb", "ann@example.org": "ann@example.org", "\u00e9": "%C3%A9"}
    if user in names:
        (home / names[user]).write_text("https://me:the-token@git.test\n")
        assert load_credentials(home, user) == b"https://me:the-token@git.test\n"


def test_a_file_that_cannot_be_read_is_an_operators_matter(tmp_path: Path) -> None:
    with pytest.raises(TransientError, match="cannot read the Git credentials"):
        load_credentials(tmp_path / "missing", "ann")


def test_what_is_secret_in_credentials() -> None:
    content = b"https://user:p%40ssword@git.test\nhttps://only-a-token@git.test\n\nnonsense\n"
    assert {"p%40ssword", "p@ssword", "only-a-token"} <= set(secrets_in(content))
    assert "user" not in secrets_in(content)
