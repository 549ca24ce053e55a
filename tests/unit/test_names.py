import subprocess

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from outwake.session.names import InvalidNameError, check_branch, check_repo, check_title, clone_url

REPOS = [
    "octo/hello",
    "octo/hello.git",
    "octo-org_corp/.github",
    "https://github.com/octo/hello",
    "https://git.internal:8443/team/sub/hello.git",
    "https://10.0.0.7/hello",
    "https://[fd00::1]:3000/hello.git",
    "https://git_server/a%20b.git",
    "ssh://git@git.internal:2222/srv/hello.git",
    "ssh://host/~octo/hello",
    "git@github.com:octo/hello.git",
    "deploy@host:srv/hello",
]


@pytest.mark.parametrize("repo", REPOS)
def test_repositories_that_pass(repo: str) -> None:
    assert check_repo(repo) == repo
    assert not clone_url(repo).startswith("-")


def test_clone_url_spells_out_github() -> None:
    assert clone_url("octo/hello") == "https://github.com/octo/hello.git"
    assert clone_url("octo/hello.git") == "https://github.com/octo/hello.git"
    assert clone_url("git@host:octo/hello") == "git@host:octo/hello"


@pytest.mark.parametrize(
    "repo",
    [
        "",
        "hello",
        "a/b/c",
        "octo/..",
        "octo/.git",
        "-octo/hello",
        "octo/hello\n",
        " octo/hello",
        "--upload-pack=touch x",
        "ext::sh -c touch% x",
        "fd::17",
        "http://host/hello",
        "git://host/hello",
        "https://-oProxyCommand=x/hello",
        "ssh://-oProxyCommand=x/hello",
        "ssh://git@-oProxyCommand=x/hello",
        "git@-oProxyCommand=x:hello",
        "git@host:--upload-pack=x",
        "-git@host:hello",
        "https://host/a b",
        "https://host/a%00b",
        "https://host/a%0ab",
        "https://host/a%7Fb",
        "https://host/a%b",
        "https://host:0/a",
        "https://host:70000/a",
        "https://host",
        "https://host/a?b",
        "https://host/a#b",
        "https://h\u00f6st/a",
        "/srv/hello",
        "./hello",
        "C:hello",
        "file://host/srv/hello",
        "https://host/" + "a" * 500,
    ],
)
def test_repositories_that_are_refused(repo: str) -> None:
    with pytest.raises(InvalidNameError):
        check_repo(repo, allow_file=True)


@pytest.mark.parametrize(
    "repo",
    [
        "https://octo:hunter2@host/hello",
        "https://hunter2@host/hello",
        "https://octo:p@hunter2@host/hello",
        "http://octo:hunter2@host/hello",
        "HTTPS://octo:hunter2@host/hello",
        "ssh://octo:hunter2@host/hello",
        "octo:hunter2@host:hello",
    ],
)
def test_credentials_are_refused_and_not_repeated(repo: str) -> None:
    with pytest.raises(InvalidNameError, match="user name or password") as caught:
        check_repo(repo)
    assert "hunter2" not in str(caught.value)


def test_file_only_where_allowed() -> None:
    assert clone_url("file:///srv/hello", allow_file=True) == "file:///srv/hello"
    with pytest.raises(InvalidNameError, match="not allowed here"):
        clone_url("file:///srv/hello")


@pytest.mark.parametrize("branch", ["main", "feature/#12-x", "renovate/@types-node", "a.b+c=d,(e)"])
def test_branches_that_pass(branch: str) -> None:
    assert check_branch(branch) == branch


DASHES_AND_DOTS = ["-x", "a..b", "x.lock", "x.lock/y", "x.", ".x", "a/.x"]
SLASHES_AND_REFS = ["/x", "x/", "a//b", "@", "HEAD", "refs/heads/x"]
CHARACTERS = [f"a{char}b" for char in "~^:?*[\\\u00e9 \n\0\x7f"]


@pytest.mark.parametrize(
    "branch", [*DASHES_AND_DOTS, *SLASHES_AND_REFS, *CHARACTERS, "", "a@{1}", "a\n", "a" * 201]
)
def test_branches_that_are_refused(branch: str) -> None:
    with pytest.raises(InvalidNameError):
        check_branch(branch)


NAMES = st.lists(
    st.sampled_from(["a", "B", "7", "-", ".", "/", "@", "{", "_", "+", "#", ".lock", "HEAD", "refs/"])
    | st.characters(max_codepoint=0x17F),
    max_size=8,
).map("".join)


@given(NAMES)
@example("@/a")
@example("a/-b")
@settings(max_examples=300, deadline=None)
def test_git_takes_every_branch_that_passes(branch: str) -> None:
    try:
        check_branch(branch)
    except InvalidNameError:
        return
    git = subprocess.run(["git", "check-ref-format", "--branch", branch], capture_output=True, check=False)
    assert git.returncode == 0
    assert git.stdout.decode() == branch + "\n"


@pytest.mark.parametrize("title", ["Fix it", "\u4fee\u6b63 \U0001f469\u200d\U0001f4bb", "t" * 200])
def test_titles_that_pass(title: str) -> None:
    assert check_title(title) == title


@pytest.mark.parametrize("title", ["", "  ", "a\nb", "a\0", "\x1b[0m", "\u2028x", "\ud800", "t" * 201])
def test_titles_that_are_refused(title: str) -> None:
    with pytest.raises(InvalidNameError):
        check_title(title)
