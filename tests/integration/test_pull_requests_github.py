"""The client of GitHub's REST API, against a stand-in that is held to GitHub's published description."""

import gzip
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from starlette.responses import JSONResponse, Response

from outwake.worker.ask import LIMIT as ASK_LIMIT
from outwake.worker.errors import PermanentError, SessionError, TransientError
from outwake.worker.repo import github as client
from outwake.worker.repo.githost import Proposal, PullRequest
from tests.support.faults import Fault, Steps
from tests.support.github import GitHub, github
from tests.support.loopback import loopback

TOKEN = "planted-token-of-the-host"
PROPOSAL = Proposal(
    url="https://git.test/octo/tools.git",
    head="outwake/fix",
    base="main",
    title="Fix it",
    body="Session 7",
    draft=True,
    credentials=f"https://bot:{TOKEN}@git.test\n".encode(),
)
OPENED = PullRequest("https://github.test/octo/tools/pull/7", 7, existed=False)


@pytest.fixture
async def host() -> AsyncIterator[GitHub]:
    async with loopback() as server:
        with github(server, Steps(), TOKEN) as made:
            yield made


async def opened(host: GitHub, proposal: Proposal = PROPOSAL) -> PullRequest | None:
    return await client.GitHub("git.test", host.url, checked=False).open_pull_request(proposal)


async def test_it_is_opened_as_github_describes_it(host: GitHub) -> None:
    assert await opened(host) == OPENED
    assert host.opened == [
        {"title": "Fix it", "head": "outwake/fix", "base": "main", "body": "Session 7", "draft": True}
    ]


@pytest.mark.parametrize("url", ["ssh://git@git.test:2222/octo/tools.git", "git@git.test:octo/tools"])
async def test_a_repository_that_git_reaches_by_ssh_has_the_same_api(host: GitHub, url: str) -> None:
    assert await opened(host, replace(PROPOSAL, url=url)) == OPENED


async def test_a_second_one_takes_the_first(host: GitHub) -> None:
    await opened(host)
    assert await opened(host) == OPENED._replace(existed=True)
    assert len(host.opened) == 1


async def test_one_of_the_same_branch_for_another_base_is_not_taken(host: GitHub) -> None:
    await opened(host)
    other = await opened(host, replace(PROPOSAL, base="release"))
    assert other is not None
    assert (other.number, other.existed) == (8, False)


async def test_one_that_was_closed_is_not_taken(host: GitHub) -> None:
    await opened(host)
    host.pulls[0]["state"] = "closed"
    other = await opened(host)
    assert other is not None
    assert (other.number, other.existed) == (8, False)


async def test_one_that_somebody_opens_meanwhile_is_taken(host: GitHub) -> None:
    await opened(host)
    host.answers["list"].append(JSONResponse([]))
    assert await opened(host) == OPENED._replace(existed=True)
    assert host.steps.met.count("open") == 2


async def test_one_whose_answer_was_lost_is_taken(host: GitHub) -> None:
    lost = host.steps.arm("open done", Fault((0, None), block=True))
    lost.release(drop=True)
    client_seconds, client.SECONDS = client.SECONDS, 0.5
    try:
        with pytest.raises(TransientError, match="did not answer"):
            await opened(host)
    finally:
        client.SECONDS = client_seconds
    assert await opened(host) == OPENED._replace(existed=True)
    assert len(host.opened) == 1


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (JSONResponse({"message": "s.SECRET"}, 401), "answered 401: the token is not valid"),
        (JSONResponse({"message": "s.SECRET"}, 403), "answered 403: the token may not open pull requests"),
        (JSONResponse({"message": "s.SECRET"}, 404), "answered 404: no such repository, or the token may"),
        (JSONResponse({"message": "s.SECRET"}, 422), "answered 422: it refused the pull request"),
        (JSONResponse([], 422), "answered 422: it refused the pull request"),
        (JSONResponse({}, 400), "answered 400"),
        (Response(status_code=301, headers={"Location": "/elsewhere"}), "301: redirects are not followed"),
        (Response(status_code=307, headers={"Location": "/elsewhere"}), "307: redirects are not followed"),
    ],
)
async def test_what_a_retry_cannot_help_is_permanent(host: GitHub, answer: Response, reason: str) -> None:
    host.answers["open"].append(answer)
    with pytest.raises(PermanentError, match=reason) as caught:
        await opened(host)
    assert "SECRET" not in str(caught.value)
    assert TOKEN not in str(caught.value)


async def test_a_wrong_token_is_permanent(host: GitHub) -> None:
    host.token = "another"
    with pytest.raises(PermanentError, match=r"git\.test answered 401"):
        await opened(host)


@pytest.mark.parametrize(
    ("missing", "drafts", "reason"),
    [
        ("main", True, "the repository has no branch main"),
        ("outwake/fix", True, "the repository has no branch outwake/fix"),
        ("", False, r"the repository has no drafts \(OUTWAKE_PULL_REQUESTS=ready\)"),
    ],
)
async def test_reasons_that_are_known_are_told(host: GitHub, missing: str, drafts: bool, reason: str) -> None:
    host.missing, host.drafts = {missing}, drafts
    with pytest.raises(PermanentError, match=reason):
        await opened(host)


async def test_a_branch_without_commits_is_told(host: GitHub) -> None:
    error = {"resource": "PullRequest", "code": "custom", "message": "No commits between main and fix"}
    host.answers["open"].append(JSONResponse({"message": "Validation Failed", "errors": [error]}, 422))
    with pytest.raises(PermanentError, match="outwake/fix has no commits that main lacks"):
        await opened(host)


@pytest.mark.parametrize(
    ("answer", "least", "most"),
    [
        (Response(status_code=500), 0, 0),
        (Response(status_code=503, headers={"Retry-After": "12"}), 12, 12),
        (Response(status_code=429, headers={"Retry-After": "30"}), 30, 30),
        (Response(status_code=429, headers={"Retry-After": "9999999"}), 3600, 3600),
        (Response(status_code=429, headers={"Retry-After": "-1"}), 0, 0),
        (Response(status_code=403, headers={"Retry-After": "60"}), 60, 60),
        (Response("{}", headers={"Content-Type": "text/html"}, status_code=201), 0, 0),
        (JSONResponse({"html_url": "javascript:alert(1)", "number": 1}, 201), 0, 0),
    ],
)
async def test_what_may_pass_is_transient(host: GitHub, answer: Response, least: float, most: float) -> None:
    host.answers["open"].append(answer)
    with pytest.raises(TransientError) as caught:
        await opened(host)
    assert least <= caught.value.after <= most
    assert await opened(host) == OPENED


async def test_a_rate_limit_says_when_it_ends(host: GitHub) -> None:
    """By the host's own clock, which need not be ours."""
    headers = {
        "X-RateLimit-Remaining": "0",
        "X-RateLimit-Reset": "784111977",
        "Date": "Sun, 06 Nov 1994 08:49:37 GMT",
    }
    host.answers["list"].append(Response(status_code=403, headers=headers))
    with pytest.raises(TransientError) as caught:
        await opened(host)
    assert caught.value.after == 200


async def test_a_host_that_is_not_there_may_come_back() -> None:
    with pytest.raises(TransientError, match=r"git\.test did not answer: ConnectError"):
        await client.GitHub("git.test", "http://127.0.0.1:1", checked=False).open_pull_request(PROPOSAL)


@pytest.mark.parametrize("packed", [False, True])
async def test_an_answer_is_bounded(host: GitHub, packed: bool) -> None:
    assert client.LIMIT < ASK_LIMIT
    body = b'["' + b"x" * client.LIMIT + b'"]'
    answer = Response(gzip.compress(body), headers={"Content-Encoding": "gzip"}) if packed else Response(body)
    host.answers["list"].append(answer)
    if packed:  # it is not unpacked, so it is no list, and none is found
        assert await opened(host) == OPENED
    else:
        with pytest.raises(TransientError, match="more than 4 MiB"):
            await opened(host)


async def test_an_api_that_nobody_configured_must_be_public(host: GitHub) -> None:
    checked = client.GitHub("git.test", host.url.replace("http:", "https:"), checked=True)
    with pytest.raises(PermanentError, match=r"not public \(OUTWAKE_GIT_ALLOW\)") as caught:
        await checked.open_pull_request(PROPOSAL)
    assert "127.0.0.1" not in str(caught.value)


@pytest.mark.parametrize(
    "credentials",
    [None, b"https://bot:token@other.test\n", b"http://bot:token@git.test\n", b"https://git.test\n"],
)
async def test_without_a_token_for_the_host_nothing_is_asked(host: GitHub, credentials: bytes | None) -> None:
    with pytest.raises(PermanentError, match=r"no token for git.test \(OUTWAKE_GIT_CREDENTIALS\)"):
        await opened(host, replace(PROPOSAL, credentials=credentials))
    assert host.steps.met == []


async def test_the_token_is_in_no_text(host: GitHub) -> None:
    host.answers["list"].append(Response(status_code=500))
    with pytest.raises(SessionError) as caught:
        await opened(host)
    assert TOKEN not in repr(caught.value) + repr(PROPOSAL) + repr(caught.traceback)
