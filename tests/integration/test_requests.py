"""Bad requests: each is answered with a problem that says where and why, and nothing is written."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import Connect
from tests.support.api import Api, serving

GOOD = {"repo": "octo/tools", "target_branch": "main", "prompt": "Do it"}


async def post(api: Api, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await api.client.post(
        "/sessions", content=content, headers={"Content-Type": "application/json", **headers}
    )


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"repo": None}, "#/repo"),
        ({"repo": "--upload-pack=x"}, "#/repo"),
        ({"repo": "https://user:secret@example.org/x"}, "#/repo"),
        ({"repo": "file:///srv/x.git"}, "#/repo"),
        ({"repo": "a/" + "b" * 500}, "#/repo"),
        ({"target_branch": "-x"}, "#/target_branch"),
        ({"target_branch": "a..b"}, "#/target_branch"),
        ({"branch": "b" * 201}, "#/branch"),
        ({"title": ""}, "#/title"),
        ({"title": "two\nlines"}, "#/title"),
        ({"title": "t" * 201}, "#/title"),
        ({"prompt": ""}, "#/prompt"),
        ({"prompt": "p" * 200_001}, "#/prompt"),
        ({"prompt": "a\0b"}, "#/prompt"),
        ({"prompt": "a\ud800b"}, "#/prompt"),
        ({"prompt": 7}, "#/prompt"),
        ({"parent": "x"}, "#/parent"),
        ({"promt": "typo"}, "#/promt"),
        ({"~/": 1}, "#/~0~1"),
        ({"\ud800": 1}, "#"),
        ({"branch": "main"}, "#"),
    ],
)
async def test_field_that_cannot_be_accepted(
    api: Api, connect: Connect, change: dict[str, Any], pointer: str
) -> None:
    response = await post(api, {**GOOD, **change})
    assert response.status_code == 422
    assert [error["pointer"] for error in response.json()["errors"]] == [pointer]
    assert "secret" not in response.text
    count = await (await connect()).execute("SELECT count(*) FROM session")
    assert await count.fetchone() == (0,)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff", b'{"repo": "\xff"}', b"[" * 100_000, b"1" * 5000, '{"a":"é"}'.encode("utf-16")],
)
async def test_body_that_is_no_json(api: Api, body: bytes) -> None:
    response = await post(api, body)
    assert (response.status_code, response.json()["type"]) == (400, "urn:outwake:problem:malformed")


@pytest.mark.parametrize("body", [b"null", b"[]", b'"x"', b"1"])
async def test_body_that_is_no_object(api: Api, body: bytes) -> None:
    response = await post(api, body)
    assert response.status_code == 422
    assert response.json()["errors"][0]["pointer"] == "#"


async def test_body_of_another_type(api: Api) -> None:
    for headers in ({"Content-Type": "text/plain"}, {"Content-Type": ""}):
        assert (await post(api, GOOD, **headers)).status_code == 415
    form = await api.client.post("/sessions", data={"repo": "a/b"})
    assert form.status_code == 415


async def test_body_that_is_too_large_is_not_read_to_its_end(database: str) -> None:
    async with serving(database, OUTWAKE_MAX_BODY=2000) as api:
        announced = await post(api, b" " * 2001)
        assert announced.status_code == 413

        sent = 0

        async def endless() -> AsyncIterator[bytes]:
            nonlocal sent
            while True:
                sent += 1000
                yield b" " * 1000

        headers = {"Content-Type": "application/json"}
        try:
            response = await api.client.post("/sessions", content=endless(), headers=headers)
            assert response.status_code == 413
        except httpx.TransportError:
            assert sent > 2000  # the connection was closed while we were still sending
        assert (await post(api, GOOD)).status_code == 201


@pytest.mark.parametrize("accept", ["text/html", "application/json;q=0", "image/*, text/*"])
async def test_no_acceptable_type(api: Api, accept: str) -> None:
    response = await api.client.get("/sessions", headers={"Accept": accept})
    assert response.status_code == 406


@pytest.mark.parametrize("accept", ["", "*/*", "application/*", "text/html, application/json;q=0.1"])
async def test_acceptable_type(api: Api, accept: str) -> None:
    assert (await api.client.get("/sessions", headers={"Accept": accept})).status_code == 200


async def test_method_that_a_path_does_not_take(api: Api) -> None:
    response = await api.client.put("/sessions", json={})
    assert response.status_code == 405
    assert set(response.headers["allow"].split(", ")) == {"GET", "HEAD", "POST"}
    assert response.headers["content-type"] == "application/problem+json"


async def test_head_is_get_without_the_body(api: Api) -> None:
    response = await api.client.head("/sessions")
    assert (response.status_code, response.content) == (200, b"")


async def test_path_that_does_not_exist(api: Api) -> None:
    for path in ("/nothing", "/sessions/", "/session"):
        response = await api.client.get(path)
        assert (response.status_code, response.json()["status"]) == (404, 404)


@pytest.mark.parametrize(
    ("path", "parameter"),
    [
        ("/sessions?limit=0", "limit"),
        ("/sessions?limit=x", "limit"),
        ("/sessions?limit=1&limit=2", "limit"),
        ("/sessions?inbox_status=lost", "inbox_status"),
        ("/sessions?nonsense=1", "nonsense"),
        ("/sessions?repo=%00", "repo"),
        ("/sessions?cursor=nonsense", "cursor"),
        ("/sessions?cursor=W10", "cursor"),
        ("/sessions?cursor=WyIyMDI2LTAxLTAxIiwiMSJd", "cursor"),
        ("/outbox?cursor=" + "W1" * 90, "cursor"),
        ("/outbox?state=done", "state"),
        ("/readyz?workers=2", "workers"),
    ],
)
async def test_query_that_cannot_be_accepted(api: Api, path: str, parameter: str) -> None:
    response = await api.client.get(path)
    assert response.status_code == 422
    assert [error["parameter"] for error in response.json()["errors"]] == [parameter]


@pytest.mark.parametrize("key", [b"", b'""', b'"a', b'a"b', "ü".encode("latin-1"), b"k" * 256, b"a b"])
async def test_key_that_cannot_be_accepted(api: Api, key: bytes) -> None:
    response = await api.client.post("/sessions", json=GOOD, headers={b"Idempotency-Key": key})
    assert response.status_code == 422
    assert response.json()["errors"][0]["header"] == "Idempotency-Key"


async def test_event_id_that_cannot_be_accepted(api: Api) -> None:
    created = await api.create()
    path = f"/sessions/{created['id']}/events"
    for event_id in (b"x", b"-1", b"1" * 19, "²".encode("latin-1")):
        response = await api.client.get(path, headers={b"Last-Event-ID": event_id})
        assert response.status_code == 422
        assert response.json()["errors"][0]["header"] == "Last-Event-ID"


async def test_pages_of_other_sites_are_refused(api: Api) -> None:
    created = await api.create()
    path = f"/sessions/{created['id']}"
    other = {"Origin": "https://evil.example"}
    assert (await api.client.post(f"{path}/cancel", headers=other)).status_code == 403
    assert (await api.client.post(f"{path}/cancel", headers={"Origin": "null"})).status_code == 403
    rebound = {"Host": "evil.example"}
    assert (await api.client.get(path, headers=rebound)).status_code == 403
    same = {"Origin": api.url}
    assert (await api.client.post(f"{path}/cancel", headers=same)).status_code == 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
BODIES = st.binary(max_size=200) | st.fixed_dictionaries(
    {},
    optional={
        name: JSON | st.text()
        for name in ("repo", "target_branch", "prompt", "title", "branch", "parent", "x")
    },
).map(lambda body: json.dumps({**GOOD, **body}).encode())


async def test_whatever_is_sent_is_never_our_fault(api: Api) -> None:
    """Statuses are checked against the document by the client; here: no 500, whatever comes."""
    bodies: list[bytes] = []

    @settings(max_examples=150, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(BODIES)
    def collect(body: bytes) -> None:
        bodies.append(body)

    collect()
    for body in bodies:
        assert (await post(api, body)).status_code in (201, 400, 422)
