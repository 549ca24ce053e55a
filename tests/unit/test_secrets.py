"""Secrets are hidden however they are spelled, and nothing else is changed."""

from pathlib import Path

import pytest

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
    assert secrets.event(event) == {
        "type": "x",
        "deep": [{"key ***": "a *** b", "number": 1.5, "none": None}],
    }
    untouched = {"type": "x"}
    assert secrets.event(untouched) is untouched


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
