"""Settings, read from the environment. docs/configuration.md lists them all: after a change of this class,
`python -m tests.unit.test_configuration` writes that page.

A setting with `repr=False` is secret. NAME_FILE may name a file that holds it, in place of NAME, and no
message repeats it.
"""

import logging
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from psycopg.conninfo import conninfo_to_dict
from pydantic import AfterValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from outwake._environment import Environment, given, is_secret, variable
from outwake.errors import ConfigurationError
from outwake.schema import SCHEMA, check_name
from outwake.session.callback import parse_networks, parse_secrets
from outwake.session.hosts import parse_hosts
from outwake.session.names import check_topics
from outwake.url import check_url, libpq_url, secrets_of_url

_LONGEST = 100 * 365 * 86400.0


def _checked_level(text: str) -> str:
    if text.upper() not in logging.getLevelNamesMapping():
        raise ValueError("must be debug, info, warning or error")
    return text


def _checked_schema(text: str) -> str:
    return check_name(text) if text else "outwake"


def _libpq_url_or_none(text: str | None) -> str | None:
    return libpq_url(text) if text else None


def _checked_networks(text: str) -> str:
    parse_networks(text)
    return text


def _checked_hosts(text: str) -> str:
    parse_hosts(text)
    return text


def _checked_secrets(text: SecretStr | None) -> SecretStr | None:
    if text is None or not text.get_secret_value():
        return None
    parse_secrets(text.get_secret_value())
    return text


def _checked_topics(text: str) -> str:
    check_topics(text)
    return text


def _checked_servers(text: SecretStr | None) -> SecretStr | None:
    """The message never shows the value: a token can be part of it."""
    if text is None or not text.get_secret_value():
        return None
    for server in text.get_secret_value().split(","):
        try:
            url = urlsplit(server.strip())
            known = url.scheme in ("nats", "tls") and url.hostname and url.port != 0
        except ValueError:  # of the port
            known = False
        if not known or url.path.strip("/") or url.query or url.fragment:
            raise ValueError("must be nats://host:port or tls://host:port, or several, separated by commas")
    return text


class Settings(BaseSettings):
    """Everything that can be configured. Times are in seconds, sizes in bytes."""

    model_config = SettingsConfigDict(
        alias_generator=variable,
        populate_by_name=True,
        extra="ignore",
        frozen=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )

    database_url: Annotated[
        str, Field(alias="DATABASE_URL", min_length=1, repr=False), AfterValidator(libpq_url)
    ]
    """Where the tables are: a `postgresql://` URL, also as SQLAlchemy writes it, or libpq's keywords.
    `postgresql://` alone leaves all to PGHOST and its like. May be a pooler in transaction mode if
    OUTWAKE_LISTEN_DATABASE_URL is not."""

    listen_database_url: Annotated[
        str | None, Field(alias="LISTEN_DATABASE_URL", repr=False), AfterValidator(_libpq_url_or_none)
    ] = None
    """A direct connection for LISTEN, where OUTWAKE_DATABASE_URL is a pooler. Default: the same."""

    schema_name: Annotated[str, Field(alias="OUTWAKE_SCHEMA"), AfterValidator(_checked_schema)] = "outwake"
    """The schema in the database that holds everything of Outwake's; its channels, locks and roles are named
    after it. The same for every process. Read when a process starts, as it is part of every query."""

    host: str = "127.0.0.1"
    """Address the API listens on."""

    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port the API listens on; 0 picks a free one."""

    dev_identity: bool = False
    """Serve everybody as operator even where strangers could connect. Without effect where tokens are
    required, that is with OUTWAKE_OIDC_ISSUER or OUTWAKE_REQUIRE_TOKEN."""

    require_token: bool = False
    """Refuse requests without a token even without an issuer: then only API tokens are accepted."""

    oidc_issuer: Annotated[str | None, Field(max_length=1000)] = None
    """URL of the OpenID Connect issuer whose tokens are accepted; empty or unset: none."""

    oidc_audience: Annotated[str, Field(min_length=1)] = "outwake"
    """What the `aud` of a token must contain."""

    oidc_role_claim: str = "realm_access.roles"
    """The claim that lists a user's roles, with dots between the names of nested ones."""

    oidc_operator_role: Annotated[str, Field(min_length=1)] = "outwake-operator"
    """The role that makes a user an operator."""

    oidc_client_id: Annotated[str, Field(min_length=1)] = "outwake-dashboard"
    """The client that the dashboard is at the issuer, for people who sign in with a browser."""

    oidc_client_secret: Annotated[SecretStr | None, Field(repr=False)] = None
    """Its secret; unset: a public client, which PKCE alone protects."""

    public_url: Annotated[str | None, Field(pattern=r"^https?://[^/?#]+$")] = None
    """Where browsers reach the dashboard, such as `https://outwake.example`. Default: as they say."""

    max_sessions: Annotated[int, Field(ge=1)] = 100
    """Unfinished sessions a user may have at once. Operators are not limited."""

    request_rate: Annotated[float, Field(gt=0)] = 20.0
    """Requests a second a user may send to one API process, ten times as many in a burst. Operators are
    not limited."""

    max_streams: Annotated[int, Field(ge=1)] = 50
    """Event streams a user may have open at one API process. Operators are not limited."""

    max_process_streams: Annotated[int, Field(ge=1)] = 5000
    """Event streams that one API process keeps open, whoever opens them."""

    max_connections: Annotated[int, Field(ge=1)] = 10_000
    """Connections that one API process keeps open; fewer if it may not open as many descriptors."""

    max_address_connections: Annotated[int, Field(ge=1)] = 256
    """Connections of one client address that have not shown a token. Behind a proxy all have its address."""

    pool_size: Annotated[int, Field(ge=1, le=1000)] = 10
    """Connections an API process opens at most."""

    max_body: Annotated[int, Field(ge=1024)] = 1_048_576
    """The largest request body the API reads."""

    allow_file_repos: bool = False
    """Whether `file://` repositories may be named. For demos and tests."""

    workspace_root: Path = Path(".state/workspaces")
    """Where directory sandboxes are, and an agent of an allocator's sandbox has its HOME."""

    agent: Literal["claude", "command"] | None = None
    """The kind of agent: `claude`, the Claude Code CLI, which reaches an allocator's sandbox by MCP;
    `command`, any program that prints JSON lines, in a directory. Unset: the one that fits the sandbox."""

    agent_command: str = "claude -p --output-format stream-json --verbose"
    """The agent, as one shell-quoted command line; the prompt is appended as its last argument; in a sandbox
    the CLI's flags are (docs/agent.md)."""

    agent_permission_mode: str = "default"
    """The CLI's --permission-mode in a sandbox. default: only the sandbox's MCP tools may be used."""

    agent_timeout: Annotated[float, Field(gt=0)] = 3600.0
    """How long one turn of an agent may take; the topic table can override it."""

    ip_allocator_url: Annotated[
        str | None, Field(alias="IP_ALLOCATOR_URL", pattern="^https?://", repr=False)
    ] = None
    """The allocator of sandboxes. Unset: a workspace directory is the sandbox."""

    sandbox: Literal["allocator", "directory"] | None = None
    """The kind of sandbox that sessions get: `allocator`, or `directory`, a workspace on the worker's host
    without isolation. Unset: allocator where IP_ALLOCATOR_URL is set."""

    borrow_wait: Annotated[float, Field(ge=0, le=300)] = 10.0
    """How long the allocator may wait for a free sandbox; then the session waits without a worker."""

    sandbox_keep: Annotated[float, Field(ge=0)] = 0.0
    """How long a finished turn's sandbox is kept for a follow-up; 0: it is returned at once."""

    git_credentials: Path | None = None
    """A git-credential-store file for every user's sessions, or a directory of one file a user."""

    git_allow: Annotated[str, AfterValidator(_checked_networks)] = ""
    """Networks, separated by commas, in which repositories may be although they are not public:
    `10.1.0.0/16,127.0.0.1`."""

    clone_bytes: Annotated[int, Field(ge=1024, le=2**43)] = 4_294_967_296
    """How large the packs of a clone may be, and, apart from them, the files of its work tree."""

    clone_files: Annotated[int, Field(ge=1)] = 500_000
    """How many files the work tree of a clone may have."""

    clone_timeout: Annotated[float, Field(gt=0)] = 600.0
    """How long a clone may take."""

    git_push: bool = False
    """Whether the work branch is pushed when a turn has ended."""

    git_hosts: Annotated[str, AfterValidator(_checked_hosts)] = ""
    """Hosts whose API opens pull requests, beside github.com, separated by commas: `HOST=github:API_BASE`,
    such as `git.example=github:https://git.example/api/v3`. `HOST=plain` is one to which git only pushes."""

    pull_requests: Literal["off", "draft", "ready"] = "off"
    """Whether a pull request is opened for a work branch when commits were pushed, as a draft or ready. Needs
    OUTWAKE_GIT_PUSH, a host with an API, and a token for it in OUTWAKE_GIT_CREDENTIALS."""

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

    stuck_webhook: Annotated[str | None, Field(pattern=r"^https?://", repr=False)] = None
    """URL that an alert is posted to, as JSON; unset: alerts are log lines only."""

    webhook_secret: Annotated[SecretStr | None, Field(repr=False), AfterValidator(_checked_secrets)] = None
    """What webhooks are signed with: `whsec_` and base64 of 24 to 64 bytes. Several, separated by spaces,
    all sign, so that a secret can be replaced. Unset: sessions cannot name a callback_url."""

    webhook_allow: Annotated[str, AfterValidator(_checked_networks)] = ""
    """Networks, separated by commas, that webhooks may reach although they are not public, also by plain
    http: `10.1.0.0/16,127.0.0.1`."""

    relay_url: Annotated[SecretStr | None, Field(repr=False), AfterValidator(_checked_servers)] = None
    """NATS, for the topics of OUTWAKE_RELAY_TOPICS: `nats://host:4222`, or `tls://`, with user and password
    or a token before the host. Several servers of one cluster are separated by commas."""

    relay_topics: Annotated[str, AfterValidator(_checked_topics)] = ""
    """Topics, separated by commas, whose rows are published to JetStream (docs/relay.md). Needs the extra
    `relay`."""

    relay_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$")] = "outwake"
    """What stands before the topic in a subject, with a dot between them."""

    relay_credentials: Path | None = None
    """A NATS credentials file (a JWT and its key). Read anew for each connection."""

    log_level: Annotated[str, AfterValidator(_checked_level)] = "info"
    """debug, info, warning or error. debug tells of every row."""

    retention: Annotated[float, Field(ge=0, le=_LONGEST)] = 7 * 86400.0
    """How long finished rows, archived sessions and answers to an Idempotency-Key are kept."""

    message_retention: Annotated[float, Field(ge=0, le=_LONGEST)] = 90 * 86400.0
    """How long the messages of a session are kept after its last change."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *_args: Any,
        **_kwargs: Any,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """What a caller gives, then the environment."""
        return init_settings, Environment(settings_cls)

    @property
    def listen_url(self) -> str:
        """The URL of the LISTEN connection."""
        return self.listen_database_url or self.database_url

    @property
    def token_required(self) -> bool:
        """Whether the API authenticates: else it is in development mode."""
        return self.require_token or bool(self.oidc_issuer)

    @property
    def pooled(self) -> bool:
        """Whether DATABASE_URL is assumed to lead to a pooler, through which nothing may be prepared."""
        return self.listen_database_url not in (None, self.database_url)

    @property
    def secrets(self) -> list[str]:
        """The secret values of these settings, as a whole and in their parts: for `worker/secrets.py`."""
        secrets = (self.oidc_client_secret, self.webhook_secret, self.relay_url)
        texts = [text.get_secret_value() for text in secrets if text is not None]
        words = [word for text in texts for word in (text, *text.split())]
        keys = [word.removeprefix("whsec_") for word in words]
        urls = (self.database_url, self.listen_url)
        passwords = [str(conninfo_to_dict(url).get("password") or "") for url in urls]
        in_urls = [secret for url in (*texts, *urls) for secret in secrets_of_url(url)]
        return [*words, *keys, *in_urls, *filter(None, passwords)]


def load() -> Settings:
    """The settings of this process.

    Raises ConfigurationError, its message one line that names the variable.
    """
    try:
        settings = Settings()  # type: ignore[call-arg]  # the environment gives the arguments
    except ValidationError as error:
        first = error.errors(include_input=False, include_context=False, include_url=False)[0]
        raise _refused(str(first["loc"][0]), first["msg"]) from None
    for alias, url in (("DATABASE_URL", settings.database_url), ("LISTEN_DATABASE_URL", settings.listen_url)):
        try:
            check_url(url)
        except ValueError as error:
            raise _refused(alias, str(error)) from None
    if settings.schema_name != SCHEMA.name:
        raise ConfigurationError("OUTWAKE_SCHEMA: was changed after outwake had been imported")
    return settings


def has_database() -> bool:
    """Whether the environment names a database, valid or not."""
    return given(Settings.model_fields["database_url"]) is not None


def _refused(alias: str, problem: str) -> ConfigurationError:
    """An error that names the variable that was set, and shows its value unless it is secret."""
    [field] = [field for field in Settings.model_fields.values() if field.alias == alias]
    if (found := given(field)) is None:
        return ConfigurationError(f"{alias}: is not set")
    name, value = found
    shown = "" if is_secret(field) else f", not {value!r}"
    return ConfigurationError(f"{name}: {problem.removeprefix('Value error, ')}{shown}")
