"""The kinds of connections that `enqueue` takes, as a type checker sees them.

Each is known by methods that no other kind has. An import would not do: the package may be absent, and then
every connection would fit.
"""

from collections.abc import Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:  # psycopg may be without a libpq
    import psycopg


class _Result(Protocol):
    def scalar(self) -> Any: ...


class _Connection(Protocol):
    """sqlalchemy.Connection."""

    def exec_driver_sql(self, statement: str, /) -> _Result: ...


class _Session(Protocol):
    """sqlalchemy.orm.Session, also a scoped one."""

    def connection(self) -> _Connection: ...
    def expunge_all(self) -> None: ...


class _AsyncConnection(Protocol):
    """sqlalchemy.ext.asyncio.AsyncConnection."""

    def exec_driver_sql(self, statement: str, /) -> Coroutine[Any, Any, _Result]: ...


class _AsyncSession(Protocol):
    """sqlalchemy.ext.asyncio.AsyncSession, also a scoped one."""

    def connection(self) -> Coroutine[Any, Any, _AsyncConnection]: ...
    def expunge_all(self) -> None: ...


class _Asyncpg(Protocol):
    """asyncpg.Connection, also one that a pool lends."""

    def fetchval(self, query: str, /, *args: Any) -> Coroutine[Any, Any, Any]: ...
    def is_in_transaction(self) -> bool: ...


class _Psycopg2(Protocol):
    """psycopg2's connection."""

    @property
    def async_(self) -> int: ...
    def cursor(self) -> Any: ...


class _Django(Protocol):
    """django.db.connection, or one of django.db.connections."""

    @property
    def vendor(self) -> str: ...
    def cursor(self) -> Any: ...


class Model(Protocol):
    """A model of pydantic 2."""

    def model_dump_json(self, *, by_alias: bool | None = None) -> str: ...


SyncConnection: TypeAlias = "psycopg.Connection[Any] | _Session | _Connection | _Psycopg2 | _Django"
AsyncConnection: TypeAlias = "psycopg.AsyncConnection[Any] | _AsyncSession | _AsyncConnection | _Asyncpg"
AnyConnection: TypeAlias = "AsyncConnection | SyncConnection"

Payload: TypeAlias = Mapping[str, Any] | Sequence[Any] | str | int | float | bool | Model
"""What becomes one JSON value: as a rule an object."""
