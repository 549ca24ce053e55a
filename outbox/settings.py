"""Settings, read from the environment. docs/configuration.md lists them all, made from this class."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from outbox.errors import ConfigurationError


def _variable(name: str) -> str:
    return f"SENDOFF_{name.upper()}"


class Settings(BaseSettings):
    """Everything that can be configured. Times are in seconds, sizes in bytes."""

    model_config = SettingsConfigDict(
        alias_generator=_variable,
        populate_by_name=True,
        extra="ignore",
        frozen=True,
        use_attribute_docstrings=True,
    )

    database_url: Annotated[str, Field(alias="DATABASE_URL", min_length=1)]
    """Where the tables are. May be a pooler in transaction mode if LISTEN_DATABASE_URL is not."""

    listen_database_url: Annotated[str | None, Field(alias="LISTEN_DATABASE_URL")] = None
    """A direct connection for LISTEN, where DATABASE_URL is a pooler. Default: DATABASE_URL."""

    host: str = "127.0.0.1"
    """Address the API listens on."""

    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port the API listens on; 0 picks a free one."""

    dev_identity: bool = False
    """Serve everybody as operator even where strangers could connect: there is no authentication yet."""

    pool_size: Annotated[int, Field(ge=1, le=1000)] = 10
    """Connections an API process opens at most."""

    max_body: Annotated[int, Field(ge=1024)] = 1_048_576
    """The largest request body the API reads."""

    allow_file_repos: bool = False
    """Whether `file://` repositories may be named. For demos and tests."""

    workspace_root: Path = Path(".state/workspaces")
    """Where the embedded form keeps workspaces."""

    agent_command: str = "claude -p --output-format stream-json --verbose"
    """The agent, as one shell-quoted command line; the prompt is appended as its last argument."""

    agent_timeout: Annotated[float, Field(gt=0)] = 3600.0
    """How long one turn of an agent may take; the topic table can override it."""

    lease: Annotated[float, Field(ge=0.2, le=3600)] = 6.0
    """How long a worker's rows stay its own without a word from it; a rescue comes this late at most."""

    outage_grace: Annotated[float, Field(ge=0)] = 300.0
    """How long agents run on while the database is down and nobody could rescue them."""

    drain_grace: Annotated[float, Field(ge=0)] = 30.0
    """How long running work may finish after SIGTERM before it is handed back."""

    listen_probe: Annotated[float, Field(ge=0)] = 0.0
    """Seconds between self-notifications that prove the LISTEN connection works; 0: none, for silence."""

    health_port: Annotated[int | None, Field(ge=0, le=65535)] = None
    """Port of a worker's health checks and metrics; unset: none. 0 picks a free one."""

    health_host: str = "127.0.0.1"
    """Address of that port. Metrics name topics, no payloads; open it to the network that scrapes only."""

    stuck_after: Annotated[float, Field(gt=0, le=30 * 86400)] = 60.0
    """How long a row may be due until readiness fails and an alert is raised."""

    stuck_webhook: Annotated[str | None, Field(pattern=r"^https?://")] = None
    """URL that an alert is posted to, as JSON; unset: alerts are log lines only."""

    log_level: str = "info"
    """debug, info, warning or error. debug tells of every row."""

    retention: Annotated[float, Field(ge=0)] = 7 * 86400.0
    """How long finished rows, archived sessions and answers to an Idempotency-Key are kept."""

    message_retention: Annotated[float, Field(ge=0)] = 90 * 86400.0
    """How long the messages of a session are kept in which nothing happens any more."""

    @property
    def listen_url(self) -> str:
        """The URL of the LISTEN connection."""
        return self.listen_database_url or self.database_url

    @property
    def pooled(self) -> bool:
        """Whether DATABASE_URL is taken for a pooler, through which nothing may be prepared."""
        return self.listen_database_url not in (None, self.database_url)


def load() -> Settings:
    """The settings of this process.

    Raises ConfigurationError, its message one line that names the variable.
    """
    try:
        return Settings()  # type: ignore[call-arg]  # the environment gives the arguments
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        problem = "is not set" if first["type"] == "missing" else first["msg"]
        if name in os.environ and not name.endswith("URL"):
            problem += f", not {os.environ[name]!r}"
        raise ConfigurationError(f"{name}: {problem}") from None
