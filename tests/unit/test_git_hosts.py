"""Which host serves a repository, and the setting that says so."""

from typing import Any

import pytest

from outwake.session.hosts import HostKind, parse_hosts
from outwake.settings import Settings
from outwake.worker.errors import PermanentError
from outwake.worker.repo.credentials import token_for
from outwake.worker.repo.githost import Proposal, host_of, place_of


def kind(repo: str, hosts: str = "") -> str:
    settings: Any = {"DATABASE_URL": "unused", "OUTWAKE_GIT_HOSTS": hosts, "OUTWAKE_ALLOW_FILE_REPOS": True}
    return host_of(repo, Settings(**settings)).kind


ENTERPRISE = "git.example=github:https://git.example/api/v3"


@pytest.mark.parametrize(
    ("repo", "hosts", "expected"),
    [
        ("octo/tools", "", "github"),
        ("https://github.com/octo/tools.git", "", "github"),
        ("https://GitHub.com:443/octo/tools", "", "github"),
        ("git@github.com:octo/tools.git", "", "github"),
        ("ssh://git@github.com:22/octo/tools", "", "github"),
        ("octo/tools", "github.com=plain", "plain"),
        ("octo/tools", ENTERPRISE, "github"),
        ("https://git.example/octo/tools", ENTERPRISE, "github"),
        ("https://git.example:8443/octo/tools", ENTERPRISE, "plain"),
        ("https://git.example:8443/octo/tools", "git.example:8443=github:https://git.example/api", "github"),
        ("ssh://git@git.example:2222/octo/tools", ENTERPRISE, "github"),
        ("https://github.com.evil.test/octo/tools", "", "plain"),
        ("https://evil.test/github.com/tools", "", "plain"),
        ("file:///srv/github.com/tools", "", "plain"),
    ],
)
def test_one_place_says_which_host_serves_a_repository(repo: str, hosts: str, expected: str) -> None:
    assert kind(repo, hosts) == expected


async def test_a_plain_host_opens_nothing() -> None:
    proposal = Proposal("file:///x", "a", "b", "t", "", draft=False, credentials=None)
    settings: Any = {"DATABASE_URL": "unused", "OUTWAKE_ALLOW_FILE_REPOS": True}
    assert await host_of("file:///x", Settings(**settings)).open_pull_request(proposal) is None


def test_what_is_no_repository_is_refused() -> None:
    with pytest.raises(PermanentError):
        kind("--upload-pack=x")


def test_hosts_are_named_beside_github() -> None:
    assert parse_hosts(f" {ENTERPRISE}/ , [::1]:8443=github:http://[::1]:80, x=plain,") == {
        "github.com": HostKind("github", "https://api.github.com"),
        "git.example": HostKind("github", "https://git.example/api/v3", configured=True),
        "[::1]:8443": HostKind("github", "http://[::1]:80", configured=True),
        "x": HostKind("plain"),
    }


@pytest.mark.parametrize(
    "text",
    [
        *("git.example", "=plain", "git.example=gitlab:https://x", "git.example=github", "x=github:"),
        *("x=github:http://git.example/api", "x=github:https://u:p@git.example", "x=github:https://h/?a=b"),
        *("x=github:https://h/a b", "x=github:https://h:99999999/", "https://x=plain", "x=plain:y"),
    ],
)
def test_what_is_no_list_of_hosts_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        parse_hosts(text)


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("https://h:8443/a/b.git", ("h:8443", "a/b.git")),
        ("ssh://h/a/b/", ("h", "a/b")),
        ("git@[::1]:/a/b", ("[::1]", "a/b")),
        ("file:///a/b", None),
    ],
)
def test_host_and_path_of_a_url(url: str, place: tuple[str, str] | None) -> None:
    assert place_of(url) == place


def test_the_token_is_that_of_the_host() -> None:
    lines = b"https://a:one@x.test\nhttps://two%40@git.test:443/path\nhttps://b:three@git.test\n"
    assert token_for("git.test", lines) == "two@"
    assert token_for("x.test", lines) == "one"
    assert token_for("y.test", lines) is None
