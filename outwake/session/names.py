"""Check the names that a user gives: a repository, a branch, a title, topics.

Every check is an allow-list. A checked name can be an argument of git: it never starts with a dash, never
names another program (`ext::`), and holds no control character. The repository's host is not restricted,
because git servers are often in internal networks.

An error message does not repeat the refused value, because it may hold a password.
"""

import re
import unicodedata

REPO_LENGTH = 500
BRANCH_LENGTH = 200
TITLE_LENGTH = 200

_GITHUB = re.compile(r"(?P<owner>[A-Za-z0-9][A-Za-z0-9_-]{0,38})/(?P<name>[A-Za-z0-9._-]{1,100})")
_USER = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_HOST = r"(?:[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?|\[[0-9A-Fa-f:.]+\])"
_PORT = r"(?::(?P<port>[0-9]{1,5}))?"
# Percent escapes must not spell a control character: git decodes them before it uses the path.
_PATH = r"(?:[A-Za-z0-9._~/+=,@:()-]|%(?![01]|7[Ff])[0-9A-Fa-f]{2})+"
_HTTPS = re.compile(rf"https://{_HOST}{_PORT}/{_PATH}")
_SSH = re.compile(rf"ssh://(?:{_USER}@)?{_HOST}{_PORT}/{_PATH}")
_SCP = re.compile(rf"{_USER}@{_HOST}:(?!-){_PATH}")
_FILE = re.compile(rf"file:///{_PATH}")
# In https: user@ and user:password@. Elsewhere: user:password@.
_CREDENTIALS = re.compile(r"https?://[^/]*@|[a-z+]+://[^/@]*:[^/]*@|[^/@]*:[^/@]*@", re.IGNORECASE)

BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that change the direction in which the text around them is shown."""

_BRANCH = re.compile(r"[A-Za-z0-9._/+@#=,()-]+")
_TOPIC = re.compile(r"(?=.{1,100}$)[a-z][a-z0-9_-]*(\.[a-z0-9_-]+)*")


class InvalidNameError(ValueError):
    """A user's name for something can't be used; the message says why, in words for that user."""


def check_repo(repo: str, *, allow_file: bool = False) -> str:
    """Return `repo` if it is a GitHub `owner/repo`, an https or ssh URL, or `git@host:path`.

    `file:///path` passes only with `allow_file`. Raises InvalidNameError.
    """
    if not repo:
        raise InvalidNameError("the repository is empty")
    if len(repo) > REPO_LENGTH:
        raise InvalidNameError(f"the repository is longer than {REPO_LENGTH} characters")
    if _CREDENTIALS.match(repo):
        raise InvalidNameError("the repository URL must not contain a user name or password")
    if repo.startswith("file:") and not allow_file:
        raise InvalidNameError("file:// repositories are not allowed here")
    if re.search(r"(^|[/:])\.\.?(/|$)", repo):
        raise InvalidNameError("no part of the repository's path may be . or ..")
    if short := _GITHUB.fullmatch(repo):
        if short["name"].removesuffix(".git").strip(".") == "":
            raise InvalidNameError("the repository's name is only dots")
        return repo
    for form in (_HTTPS, _SSH, _SCP, _FILE):
        if matched := form.fullmatch(repo):
            port = matched.groupdict().get("port")
            if port is not None and not 0 < int(port) < 65536:
                raise InvalidNameError("the repository URL's port is not between 1 and 65535")
            return repo
    raise InvalidNameError(
        "the repository must be a GitHub owner/repo, an https:// or ssh:// URL, or git@host:path"
    )


def clone_url(repo: str, *, allow_file: bool = False) -> str:
    """Return the argument of `git clone` for `repo`. Raises InvalidNameError as `check_repo` does."""
    check_repo(repo, allow_file=allow_file)
    if _GITHUB.fullmatch(repo):
        return f"https://github.com/{repo.removesuffix('.git')}.git"
    return repo


def check_branch(branch: str) -> str:
    """Return `branch` if git accepts it as a branch name. Raises InvalidNameError.

    The rules of git-check-ref-format(1), limited to ASCII letters, digits and `._/+@#=,()-`.
    """
    if not branch:
        raise InvalidNameError("the branch is empty")
    if len(branch) > BRANCH_LENGTH:
        raise InvalidNameError(f"the branch is longer than {BRANCH_LENGTH} characters")
    if not _BRANCH.fullmatch(branch):
        raise InvalidNameError("a branch may hold only ASCII letters, digits and ._/+@#=,()-")
    if branch.startswith("-"):
        raise InvalidNameError("a branch must not start with a dash")
    if branch.startswith("refs/"):
        raise InvalidNameError("name the branch alone, without refs/heads/")
    if branch in ("HEAD", "@"):
        raise InvalidNameError("HEAD and @ are not branches")
    if ".." in branch:
        raise InvalidNameError("a branch must not contain two dots in a row")
    for part in branch.split("/"):
        if not part:
            raise InvalidNameError("a branch must not start or end with a slash, or hold two in a row")
        if part.startswith(".") or part.endswith((".", ".lock")):
            raise InvalidNameError("no part of a branch may start with a dot, or end with a dot or .lock")
    return branch


def check_title(title: str) -> str:
    """Return `title` if it is one line of at most 200 characters. Raises InvalidNameError."""
    if not title.strip():
        raise InvalidNameError("the title is empty")
    if len(title) > TITLE_LENGTH:
        raise InvalidNameError(f"the title is longer than {TITLE_LENGTH} characters")
    # Cc: controls. Cs: lone surrogates, which Postgres refuses. Zl, Zp: line and paragraph separators.
    if any(char in BIDI or unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in title):
        raise InvalidNameError("the title must not contain control characters or line breaks")
    return title


def check_topics(text: str) -> tuple[str, ...]:
    """The topics of a comma-separated list, each once. Raises InvalidNameError.

    A topic must be valid for outbox.topic and as a NATS subject: no dot at its end, no two in a row.
    """
    topics = [word.strip() for word in text.split(",") if word.strip()]
    for topic in topics:
        if "*" in topic or ">" in topic:
            raise InvalidNameError(f"name each topic, without wildcards: {topic}")
        if not _TOPIC.fullmatch(topic):
            raise InvalidNameError(f"not a topic that a subject can be made from: {topic}")
    return tuple(dict.fromkeys(topics))
