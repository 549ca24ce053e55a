"""Titles and branches: given or derived, a branch unique in its repository, however that is named."""

import pytest

from tests.conftest import Connect
from tests.support.api import Api

SAME = [
    "octo/tools",
    "Octo/Tools",
    "octo/tools.git",
    "https://github.com/octo/tools",
    "https://GitHub.com/octo/tools.git",
    "https://github.com/octo/tools/",
    "ssh://git@github.com/octo/tools.git",
    "git@github.com:octo/tools.git",
    "git@github.com:/octo/tools",
]
OTHERS = [
    "octo/tools2",
    "octo2/tools",
    "https://git.example/octo/tools",
    "https://git.example/Octo/tools",
    "https://git.example:8443/octo/tools",
    "git@[::1]:octo/tools",
]


async def test_one_repository_by_many_names(connect: Connect) -> None:
    conn = await connect()
    cursor = await conn.execute("SELECT DISTINCT repo_key(r) FROM unnest(%s::text[]) AS r", (SAME,))
    assert await cursor.fetchall() == [("github.com/octo/tools",)]
    cursor = await conn.execute(
        "SELECT count(DISTINCT repo_key(r)) FROM unnest(%s::text[]) AS r", (SAME + OTHERS,)
    )
    assert await cursor.fetchall() == [(1 + len(OTHERS),)]


@pytest.mark.parametrize("repo", SAME)
async def test_a_given_branch_that_is_taken_is_refused(api: Api, repo: str) -> None:
    first = await api.create(repo="octo/tools", branch="fix")
    asked = {"repo": repo, "target_branch": "main", "branch": "fix"}
    refused = await api.client.post("/sessions", json=asked)
    assert refused.status_code == 409
    assert refused.json()["type"] == "urn:outwake:problem:branch-taken"
    await api.client.delete(f"/sessions/{first['id']}")
    assert (await api.client.post("/sessions", json=asked)).status_code == 201


async def test_the_same_branch_in_another_repository(api: Api) -> None:
    for repo in ["octo/tools", *OTHERS]:
        await api.create(repo=repo, branch="fix")


async def test_a_derived_branch_that_is_taken_is_resolved(api: Api, connect: Connect) -> None:
    """The first id would give a branch that somebody has: the next one gives another."""
    conn = await connect()
    await api.create(repo="octo/tools", branch="outwake/fix-it-00000000")
    await conn.execute(
        """
        ALTER FUNCTION uuid_v7() RENAME TO uuid_v7_real;
        CREATE SEQUENCE taken;
        CREATE FUNCTION uuid_v7() RETURNS uuid LANGUAGE sql VOLATILE SET search_path FROM CURRENT AS $$
            SELECT CASE WHEN nextval('taken') = 1
                THEN overlay(uuid_v7_real()::text PLACING '00000000' FROM 29)::uuid
                ELSE uuid_v7_real() END
        $$;
        """
    )
    created = await api.create(repo="https://github.com/Octo/tools", title="Fix it")
    assert created["branch"].startswith("outwake/fix-it-")
    assert created["branch"] != "outwake/fix-it-00000000"
    cursor = await conn.execute("SELECT last_value > 1 FROM taken")
    assert await cursor.fetchall() == [(True,)]


@pytest.mark.parametrize(
    ("fields", "title", "stem"),
    [
        ({"prompt": "\n  Fix  the parser\nand more"}, "Fix the parser", "outwake/fix-the-parser-"),
        ({"prompt": "x" * 300}, "x" * 79 + "…", "outwake/" + "x" * 40 + "-"),
        ({"prompt": "日本語"}, "日本語", "outwake/octo-tools-"),
        ({"prompt": None}, "octo/tools", "outwake/octo-tools-"),
        ({"title": "Größe; rm -rf /"}, "Größe; rm -rf /", "outwake/groe-rm-rf-"),
    ],
)
async def test_what_is_derived(api: Api, fields: dict[str, str], title: str, stem: str) -> None:
    created = await api.create(**fields)
    assert created["title"] == title
    assert created["branch"] == stem + created["id"][-8:]
