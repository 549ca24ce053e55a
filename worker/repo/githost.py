"""The seam to Git hosts: which one serves a repository, and how it opens a pull request.

There are two kinds. A plain host is cloned from and pushed to, and opens none. `github` has GitHub's REST API
(worker/repo/github.py). OUTWAKE_GIT_HOSTS says which host is of which kind; `host_of` is the one place that
decides.
"""

import re
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from outwake.session.hosts import parse_hosts
from outwake.session.names import InvalidNameError, clone_url
from outwake.settings import Settings
from outwake.worker.errors import PermanentError

_HTTPS = re.compile(r"https://(?P<host>[^/]+?)(?::443)?/(?P<path>.+)")
_SSH = re.compile(
    r"(?:ssh://(?:[^@/]*@)?(?P<host>\[[^\]/]*\]|[^:/]+)(?::\d+)?/|[^@/]*@(?P<scp>\[[^\]/]*\]|[^:/]+):/?)(?P<path>.+)"
)


@dataclass(frozen=True)
class Proposal:
    """A pull request that is to be opened.

    url: the repository's, as `clone_url` makes it. head: the work branch, pushed. base: the target branch.
    credentials: the user's, in the format of git-credential-store.
    """

    url: str
    head: str
    base: str
    title: str
    body: str = field(repr=False)
    draft: bool
    credentials: bytes | None = field(repr=False)


class PullRequest(NamedTuple):
    """An open pull request. url: for a browser; http or https, at most 500 characters."""

    url: str
    number: int
    existed: bool


class GitHost(Protocol):
    """A kind of Git host."""

    kind: str

    def serves(self, url: str) -> bool:
        """Whether the repository is at this host."""

    async def open_pull_request(self, proposal: Proposal) -> PullRequest | None:
        """Open it, or take the open one that has its head and base; None: this host has none to open.

        May be called again for the same proposal. Raises PermanentError, or TransientError, which may say
        when to come back.
        """


class PlainHost:
    """Serves every URL; opens nothing."""

    kind = "plain"

    def serves(self, url: str) -> bool:
        return True

    async def open_pull_request(self, proposal: Proposal) -> PullRequest | None:
        return None


def host_of(repo: str, settings: Settings) -> GitHost:
    """The host that serves this repository. Raises PermanentError if the name is none."""
    try:
        url = clone_url(repo, allow_file=settings.allow_file_repos)
    except InvalidNameError as error:
        raise PermanentError(str(error)) from error
    return next((host for host in _hosts(settings) if host.serves(url)), PlainHost())


def _hosts(settings: Settings) -> list[GitHost]:
    from outwake.worker.repo.github import GitHub  # here: an idle worker saves httpx

    return [
        GitHub(name, known.api, checked=not known.configured, allow=settings.git_allow)
        for name, known in parse_hosts(settings.git_hosts).items()
        if known.api is not None
    ]


def place_of(url: str) -> tuple[str, str] | None:
    """Host and path of a repository's URL; None if it has no host. A port belongs to the host in https only:
    that of ssh says nothing about the web's.
    """
    if matched := _HTTPS.fullmatch(url):
        return matched["host"].lower(), matched["path"].strip("/")
    if matched := _SSH.fullmatch(url):
        return (matched["host"] or matched["scp"]).lower(), matched["path"].strip("/")
    return None
