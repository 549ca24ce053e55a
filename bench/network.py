"""Hosts for `bench.scaling`: network namespaces, each joined to a bridge by a veth pair; else just processes.

All addresses are of 198.18.0.0/15, which is set aside for benchmarks, and only on interfaces made here. They
are removed when the block ends, also on failure, and what an earlier run that was killed left over is removed
before a new one begins.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

BRIDGE = "outwakebench"
"""Its name; those of the namespaces and of their ends of the pairs begin with it."""
SUBNET = "198.18.77"


class Host(NamedTuple):
    """Where processes run: what their commands begin with, and the address that they are reached at."""

    prefix: tuple[str, ...] = ()
    address: str = "127.0.0.1"


class Network(NamedTuple):
    """The hosts, the address at which they find the server, and what they are."""

    hosts: list[Host]
    server: str
    kind: str


@contextmanager
def network(count: int) -> Iterator[Network]:
    """So many hosts, until the block ends."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        yield _processes(count, "no root, or no `ip`")
        return
    _remove()
    try:
        try:
            hosts = _namespaces(count)
        except subprocess.CalledProcessError as error:
            yield _processes(count, error.stderr.decode().strip())
            return
        yield Network(hosts, f"{SUBNET}.1", "each host a network namespace, joined to the server's by a veth")
    finally:
        _remove()


def _processes(count: int, why: str) -> Network:
    kind = f"each host only a process: network namespaces cannot be had ({why})"
    return Network([Host()] * count, "127.0.0.1", kind)


def _namespaces(count: int) -> list[Host]:
    _ip("link", "add", BRIDGE, "type", "bridge")
    _ip("addr", "add", f"{SUBNET}.1/24", "dev", BRIDGE)
    _ip("link", "set", BRIDGE, "up")
    return [_namespace(f"{BRIDGE}-{number}", number) for number in range(2, count + 2)]


def _namespace(name: str, number: int) -> Host:
    _ip("netns", "add", name)
    _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
    _ip("link", "set", name, "master", BRIDGE, "up")
    _ip("-n", name, "addr", "add", f"{SUBNET}.{number}/24", "dev", "eth0")
    _ip("-n", name, "link", "set", "eth0", "up")
    _ip("-n", name, "link", "set", "lo", "up")
    return Host(("ip", "netns", "exec", name), f"{SUBNET}.{number}")


def _remove() -> None:
    for line in _ip("netns", "list").splitlines():
        name = line.split()[0]
        if name.startswith(f"{BRIDGE}-"):
            _remove_link(name)  # with its namespace it would go too, but some time later
            _ip("netns", "del", name)
    _remove_link(BRIDGE)


def _remove_link(name: str) -> None:
    with suppress(subprocess.CalledProcessError):  # there is none
        _ip("link", "del", name)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True).stdout.decode()
