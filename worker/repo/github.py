"""Pull requests by GitHub's REST API, version 2022-11-28: github.com, and GitHub Enterprise by its base.

1. Ask for the open pull requests of the head branch. One that has our base is taken: an earlier attempt may
   have opened it and died before it could say so.
2. Else open one. 422 may mean that somebody has opened it meanwhile, so ask once more.

What the host answers is not quoted: its words are others' text. A few of its reasons are known, and told in
words of ours.
"""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from outwake.session.callback import CallbackError, parse_networks
from outwake.worker.ask import Answer, NoAnswer, ask
from outwake.worker.checked_transport import CallbackTransport, tls_context
from outwake.worker.errors import PermanentError, TransientError
from outwake.worker.repo.credentials import token_for
from outwake.worker.repo.githost import Proposal, PullRequest, place_of

LIMIT = 4 * 2**20  # bytes of an answer: 30 pull requests with the longest bodies
SECONDS = 30.0  # for one request
LONGEST_WAIT = 3600.0  # seconds that the host may ask us to stay away
_URL_LENGTH = 500

_PATH = re.compile(r"([A-Za-z0-9._-]{1,100})/([A-Za-z0-9._-]{1,100}?)(?:\.git)?")
_LINK = re.compile(r"https?://[\x21-\x7e]+")


class GitHub:
    """checked: its API must be at a public address, or in a network of OUTWAKE_GIT_ALLOW."""

    kind = "github"

    def __init__(self, name: str, api: str, *, checked: bool, allow: str = "") -> None:
        self._name = name
        self._api = api
        self._checked = checked
        self._allow = allow

    def serves(self, url: str) -> bool:
        """Whether the repository is at this host."""
        place = place_of(url)
        return place is not None and place[0] == self._name

    async def open_pull_request(self, proposal: Proposal) -> PullRequest | None:
        """As `GitHost` has it."""
        place = place_of(proposal.url)
        matched = _PATH.fullmatch(place[1]) if place else None
        if matched is None:
            raise PermanentError(f"no repository of {self._name} has such a path")
        token = token_for(self._name, proposal.credentials)
        if token is None:
            raise PermanentError(f"there is no token for {self._name} (OUTWAKE_GIT_CREDENTIALS)")
        owner, pulls = matched[1], f"{self._api}/repos/{matched[1]}/{matched[2]}/pulls"
        async with self._client(token) as client:
            if found := await self._find(client, pulls, owner, proposal):
                return found
            answer = await self._ask(client, "POST", pulls, body=_asked(proposal))
            if answer.status == 422 and (found := await self._find(client, pulls, owner, proposal)):
                return found
            if answer.status != 201:
                raise self._refused(answer, proposal)
        if opened := _read(answer.json, proposal, existed=False):
            return opened
        raise TransientError(f"{self._name} answered with no pull request")

    async def _find(
        self, client: httpx.AsyncClient, pulls: str, owner: str, proposal: Proposal
    ) -> PullRequest | None:
        # Without base, which is compared here: with both, the URL could be too long.
        query: dict[str, str | float] = {"head": f"{owner}:{proposal.head}", "state": "open"}
        answer = await self._ask(client, "GET", pulls, query=query)
        if answer.status != 200:
            raise self._refused(answer, proposal)
        listed = answer.json if isinstance(answer.json, list) else []
        read = (_read(one, proposal, existed=True) for one in listed)
        return next((one for one in read if one is not None), None)

    async def _ask(self, client: httpx.AsyncClient, method: str, url: str, **more: Any) -> Answer:
        try:
            return await ask(client, method, url, seconds=SECONDS, limit=LIMIT, **more)
        except NoAnswer as error:
            raise TransientError(f"{self._name} did not answer: {error}") from error
        except CallbackError:  # it tells the address
            raise PermanentError(f"the API of {self._name} is not public (OUTWAKE_GIT_ALLOW)") from None

    @asynccontextmanager
    async def _client(self, token: str) -> AsyncIterator[httpx.AsyncClient]:
        headers = {
            "Accept": "application/vnd.github+json",
            "Authorization": f"Bearer {token}",
            "User-Agent": "outwake",
            "X-GitHub-Api-Version": "2022-11-28",
        }
        if not all(" " < char <= "~" for char in token):
            raise PermanentError(f"the token for {self._name} is not one (OUTWAKE_GIT_CREDENTIALS)")
        transport = CallbackTransport(parse_networks(self._allow)) if self._checked else None
        async with httpx.AsyncClient(
            headers=headers, transport=transport, verify=tls_context(), trust_env=False
        ) as client:
            yield client

    def _refused(self, answer: Answer, proposal: Proposal) -> PermanentError | TransientError:
        said = f"{self._name} answered {answer.status}"
        match answer.status:
            case status if status >= 500 or status in (408, 429) or _limited(answer):
                return TransientError(said, _pause(answer.headers))
            case 401:
                return PermanentError(f"{said}: the token is not valid")
            case 403:
                return PermanentError(f"{said}: the token may not open pull requests here")
            case 404:
                return PermanentError(f"{said}: no such repository, or the token may not see it")
            case 422:
                return PermanentError(f"{said}: {_reason(answer.json, proposal)}")
            case status if 300 <= status < 400:
                return PermanentError(f"{said}: redirects are not followed; the repository may be renamed")
        return PermanentError(said)


def _asked(proposal: Proposal) -> dict[str, str | bool]:
    return {
        "title": proposal.title,
        "head": proposal.head,
        "base": proposal.base,
        "body": proposal.body,
        "draft": proposal.draft,
    }


def _read(found: Any, proposal: Proposal, *, existed: bool) -> PullRequest | None:
    """What the host says of a pull request; None if it is not the proposal's, or not in its form."""
    match found:
        case {"html_url": str(url), "number": int(number), "head": {"ref": head}, "base": {"ref": base}}:
            ours = (head, base) == (proposal.head, proposal.base)
            if ours and len(url) <= _URL_LENGTH and _LINK.fullmatch(url):
                return PullRequest(url, number, existed)
    return None


def _limited(answer: Answer) -> bool:
    """GitHub says 403 for its rate limits too."""
    headers = answer.headers
    return answer.status == 403 and ("retry-after" in headers or headers.get("x-ratelimit-remaining") == "0")


def _pause(headers: httpx.Headers) -> float:
    """Seconds that the host asks us to wait; 0 if it does not say."""
    wait, reset = (_number(headers.get(name, "")) for name in ("retry-after", "x-ratelimit-reset"))
    if not wait and reset and headers.get("x-ratelimit-remaining") == "0":
        wait = reset - _date(headers)  # by the host's own clock
    return min(max(wait, 0.0), LONGEST_WAIT)


def _date(headers: httpx.Headers) -> float:
    """When the host answered, as it says; 0 if it does not."""
    with suppress(ValueError):
        return parsedate_to_datetime(headers.get("date", "")).timestamp()
    return 0.0


def _number(text: str) -> float:
    return float(text) if re.fullmatch(r"[0-9]{1,12}", text) else 0.0


def _reason(said: Any, proposal: Proposal) -> str:
    errors = said.get("errors") if isinstance(said, dict) else None
    for error in errors[:20] if isinstance(errors, list) else []:
        match error:
            case {"field": "base", "code": "invalid"}:
                return f"the repository has no branch {proposal.base}"
            case {"field": "head", "code": "invalid"}:
                return f"the repository has no branch {proposal.head}"
            case {"message": str(words)} if words.startswith("No commits between"):
                return f"{proposal.head} has no commits that {proposal.base} lacks"
            case {"message": str(words)} if words.startswith("Draft pull requests are not supported"):
                return "the repository has no drafts (OUTWAKE_PULL_REQUESTS=ready)"
    return "it refused the pull request"
