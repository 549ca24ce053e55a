"""Which hosts a clone may reach, and by which addresses."""

from ipaddress import ip_address
from typing import Any

import pytest

from outwake.session.callback import Address
from outwake.settings import Settings
from outwake.worker.errors import PermanentError, TransientError
from outwake.worker.repo.hosts import Remote, remote_of


async def remote(repo: str, *addresses: str, **settings: Any) -> Remote:
    """As `remote_of` has it, where the DNS knows these addresses for any name."""

    async def resolve(host: str) -> list[Address]:
        try:
            return [ip_address(host)]
        except ValueError:
            return [ip_address(address) for address in addresses]

    given = Settings(DATABASE_URL="unused", **settings)  # type: ignore[call-arg]
    return await remote_of(repo, given, None, resolve if addresses else None)


@pytest.mark.parametrize(
    "repo",
    [
        *("https://127.0.0.2:15862/x.git", "https://2130706434/x", "https://0x7f.1/x", "https://localhost/x"),
        *("https://[::1]/x", "https://[::ffff:10.0.0.1]/x", "https://169.254.169.254/latest/meta-data"),
        *("ssh://git@127.0.0.1/x", "ssh://127.0.0.1:22/x", "git@127.0.0.1:x", "git@localhost:x/y"),
        *("https://[fe80::1]/x", "https://0.0.0.0/x", "https://[64:ff9b::7f00:1]/x", "git@[::1]:x"),
    ],
)
async def test_a_host_in_our_network_is_refused(repo: str) -> None:
    with pytest.raises(PermanentError, match=r"not public|cannot be resolved"):
        await remote(repo)


@pytest.mark.parametrize("private", ["10.0.0.1", "127.0.0.1", "fd00::1", "::1", "169.254.1.1"])
@pytest.mark.parametrize(
    "repo", ["octo/tools", "https://git.test/x", "ssh://git@git.test/x", "git@git.test:x"]
)
async def test_a_name_of_which_one_address_is_not_public_is_refused(repo: str, private: str) -> None:
    with pytest.raises(PermanentError, match="not public") as caught:
        await remote(repo, "93.184.215.14", private)
    assert private not in str(caught.value)


async def test_what_is_listed_may_be_reached() -> None:
    made = await remote("https://git.test:8443/x", "10.1.2.3", OUTWAKE_GIT_ALLOW="10.1.0.0/16")
    assert made.resolved == "git.test:8443:10.1.2.3"
    with pytest.raises(PermanentError):
        await remote("https://git.test:8443/x", "10.2.2.3", OUTWAKE_GIT_ALLOW="10.1.0.0/16")


@pytest.mark.parametrize(
    ("repo", "resolved"),
    [
        ("octo/tools", "github.com:443:93.184.215.14,[2606:2800:21f::1]"),
        ("https://git.test/a@b:c/d.git", "git.test:443:93.184.215.14,[2606:2800:21f::1]"),
        ("ssh://git@git.test:2222/x", ""),
        ("git@git.test:x", ""),
    ],
)
async def test_git_gets_the_addresses_that_were_checked(repo: str, resolved: str) -> None:
    assert (await remote(repo, "93.184.215.14", "2606:2800:21f::1")).resolved == resolved


async def test_a_name_without_an_address_may_have_one_later() -> None:
    with pytest.raises(TransientError, match="cannot be resolved"):
        await remote("https://nowhere.invalid/x")


async def test_a_file_has_no_host() -> None:
    assert (await remote("file:///srv/x.git", OUTWAKE_ALLOW_FILE_REPOS=True)).resolved == ""
