"""The hosts of a database URL: which of them is tried first, and which may not be used any more.

A URL may name several hosts, for a failover. The host that answered last is tried first, so that a host that
does not answer costs its connect timeout once.

After a failover the old primary may come back writable beside the new one. Each promotion begins a timeline,
which the names of a server's WAL files hold. This process remembers the newest timeline that it has seen of
each cluster. It refuses a connection to an older timeline, and gives up the connections that it has to one.
This protects only a process that has seen the new primary. Fencing the old primary stays the operator's duty
(docs/deployment.md).
"""

from typing import NamedTuple

from psycopg.conninfo import conninfo_to_dict, make_conninfo

_KEYS = ("host", "hostaddr", "port")


class Origin(NamedTuple):
    """What a connection's server said of itself. Both are None if it may not say so, or is a standby."""

    cluster: str | None
    timeline: int | None


_answered: dict[str, list[int]] = {}
"""By the hosts of a URL: their places, in the order in which they are tried."""
_newest: dict[str, int] = {}
"""By cluster: the newest timeline seen."""


def in_order(conninfo: str) -> str:
    """The conninfo with the host first that answered last."""
    order = _answered.get(_hosts(conninfo))
    if order is None:
        return conninfo
    found = conninfo_to_dict(conninfo)
    lists = {key: str(found[key]).split(",") for key in _KEYS if found.get(key)}
    swapped = {
        key: ",".join(values[place] for place in order) if len(values) == len(order) else ",".join(values)
        for key, values in lists.items()
    }
    return make_conninfo(conninfo, **swapped)


def answered(conninfo: str, host: str, port: int, *, well: bool = True) -> None:
    """This host of the conninfo has answered: try it first from now on, or last."""
    found = conninfo_to_dict(conninfo)
    names = str(found.get("host") or found.get("hostaddr") or "").split(",")
    ports = str(found.get("port") or "").split(",")
    if len(names) < 2:
        return
    if len(ports) != len(names):
        ports = ports[:1] * len(names)
    used = (host, str(port))
    for place, (name, text) in enumerate(zip(names, ports, strict=True)):
        if (name, text or "5432") == used:
            others = [other for other in _order(conninfo, len(names)) if other != place]
            _answered[_hosts(conninfo)] = [place, *others] if well else [*others, place]
            return


def is_behind(origin: Origin) -> bool:
    """Whether a server of the same cluster with a newer timeline has been seen. Remembers the newest."""
    cluster, timeline = origin
    if cluster is None or timeline is None:
        return False
    newest = _newest.setdefault(cluster, timeline)
    _newest[cluster] = max(newest, timeline)
    return timeline < newest


def _order(conninfo: str, count: int) -> list[int]:
    return _answered.get(_hosts(conninfo)) or list(range(count))


def _hosts(conninfo: str) -> str:
    found = conninfo_to_dict(conninfo)
    return " ".join(str(found.get(key)) for key in _KEYS)
