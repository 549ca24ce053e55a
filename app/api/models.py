"""Models of requests and answers. The OpenAPI document is made from them.

The database makes the answers (session_json and similar functions in sql/), and the API sends them as they
are. A test compares real answers with these models.
"""

from datetime import datetime
from typing import Annotated, Any, Literal, Self
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from outwake.session.callback import URL_LENGTH, check_callback, parse_networks
from outwake.session.names import (
    BRANCH_LENGTH,
    REPO_LENGTH,
    TITLE_LENGTH,
    check_branch,
    check_repo,
    check_title,
)
from outwake.settings import Settings

PROMPT_LENGTH = 200_000  # CHECK prompt_text_length
MAX_SEQ = 2**63 - 1


def _storable(text: str) -> str:
    """Check that Postgres can store the text."""
    if "\0" in text:
        raise ValueError("must not contain the character NUL")
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError("must not contain half of a surrogate pair")
    return text


def _repo(repo: str, info: ValidationInfo) -> str:
    return check_repo(repo, allow_file=_settings(info).allow_file_repos)


def _settings(info: ValidationInfo) -> Settings:
    assert info.context is not None
    found = info.context["settings"]
    assert isinstance(found, Settings)
    return found


def _callback(url: str, info: ValidationInfo) -> str:
    settings = _settings(info)
    if settings.webhook_secret is None:
        raise ValueError("webhooks are not set up here: OUTWAKE_WEBHOOK_SECRET is not set")
    return check_callback(url, parse_networks(settings.webhook_allow))


Storable = AfterValidator(_storable)
# The patterns are for the document only. They accept all that the checks accept, and the checks give better
# errors.
Repo = Annotated[
    str,
    Field(
        max_length=REPO_LENGTH,
        examples=["octo/tools"],
        json_schema_extra={
            "pattern": r"^([A-Za-z0-9][A-Za-z0-9_-]*/[A-Za-z0-9._-]+|(https|ssh|file)://[!-~]+"
            r"|[A-Za-z0-9_][A-Za-z0-9._-]*@[!-~]+)$"
        },
    ),
    AfterValidator(_repo),
]
Branch = Annotated[
    str,
    Field(
        max_length=BRANCH_LENGTH,
        examples=["main"],
        json_schema_extra={"pattern": r"^[A-Za-z0-9._/+@#=,()-]+$"},
    ),
    AfterValidator(check_branch),
]
Callback = Annotated[
    str,
    Field(
        max_length=URL_LENGTH,
        examples=["https://hooks.example/outwake"],
        json_schema_extra={"pattern": "^[Hh][Tt][Tt][Pp][Ss]?://[!-~]+$"},
    ),
    AfterValidator(_callback),
]
Title = Annotated[
    str,
    Field(max_length=TITLE_LENGTH, examples=["Fix it"], json_schema_extra={"pattern": r"\S"}),
    AfterValidator(check_title),
]
PromptText = Annotated[str, Field(min_length=1, max_length=PROMPT_LENGTH), Storable]

InboxStatus = Literal["active", "pending", "completed", "archived"]
SessionStatus = Literal["active", "archived"]
PromptStatus = Literal["queued", "running", "succeeded", "failed", "cancelled"]


class Request(BaseModel):
    """Unknown fields are refused: a misspelt one would be lost without a word."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class SessionCreate(Request):
    repo: Repo
    """A GitHub `owner/repo`, an https or ssh URL, or `git@host:path`."""
    target_branch: Branch
    """The branch the work starts from."""
    prompt: PromptText | None = None
    """What the agent shall do. Without one the session is only prepared."""
    title: Title | None = None
    """Default: the first line of the prompt, else the repository."""
    branch: Branch | None = None
    """The branch the work goes to. Default: `outwake/`, words of the title, and a part of the id."""
    parent: UUID | None = None
    """The session this one continues."""
    callback_url: Callback | None = None
    """Where its webhooks go."""

    @model_validator(mode="after")
    def _two_branches(self) -> Self:
        if self.branch == self.target_branch:
            raise ValueError("branch and target_branch must differ")
        return self


class PromptCreate(Request):
    prompt: PromptText
    """What the agent shall do next."""


class SessionPatch(Request):
    title: Title


class SessionQuery(Request):
    limit: Annotated[int, Field(ge=1, le=200)] = 50
    cursor: Annotated[str, Field(max_length=200), Storable] | None = None
    """`next` of the page before."""
    inbox_status: InboxStatus | None = None
    session_status: SessionStatus | Literal["any"] = "active"
    repo: Annotated[str, Field(max_length=REPO_LENGTH), Storable] | None = None


class PromptQuery(Request):
    limit: Annotated[int, Field(ge=1, le=200)] = 50
    cursor: Annotated[str, Field(max_length=200), Storable] | None = None
    """`prompts_next` of the session, or `next` of the page before."""


class MessageQuery(Request):
    after: Annotated[int, Field(ge=0, le=MAX_SEQ)] = 0
    """Only messages with a higher `seq`: `next` of the page before."""
    limit: Annotated[int, Field(ge=1, le=1000)] = 100
    attempts: Literal["last", "all"] = "last"
    """`last`: what each prompt's last attempt said. `all`: also what was superseded."""


class EventQuery(Request):
    after: Annotated[int, Field(ge=0, le=MAX_SEQ)] = 0
    """Begin behind this `seq`. A Last-Event-ID header wins over it."""
    until: Literal["completed"] | None = None
    """End the stream once the session is completed and everything was sent."""


class RowQuery(Request):
    state: Literal["dead"] = "dead"
    limit: Annotated[int, Field(ge=1, le=200)] = 50
    cursor: Annotated[str, Field(max_length=200), Storable] | None = None
    """`next` of the page before."""


class ReadyQuery(Request):
    workers: Literal["0", "1"] = "0"
    """`1`: not ready either without a worker present, or when a row is stuck."""


class NoQuery(Request):
    pass


class PullRequest(Answer):
    """What came of opening one for the session's branch."""

    url: str | None
    """For a browser."""
    number: int | None
    error: str | None
    """Why the last attempt failed."""


class Session(Answer):
    id: UUID
    user_id: str
    repo: str
    target_branch: str
    branch: str
    title: str
    parent: UUID | None
    callback_url: str | None
    inbox_status: InboxStatus
    """`active`: work waits. `pending`: a worker has it. `completed`: nothing is left to do. `archived`."""
    session_status: SessionStatus
    pull_request: PullRequest | None = None
    """The one that Outwake opened; null until it was tried."""
    created_at: datetime
    updated_at: datetime


class Retrying(Answer):
    """A turn that failed and is tried again."""

    failures: int
    max_attempts: int
    """After as many failures the prompt is `failed`."""
    error: str | None
    """Why it failed last."""
    next_try_at: datetime | None
    """When it is tried next at the earliest; null: now."""


class Prompt(Answer):
    id: UUID
    session_id: UUID
    text: str
    status: PromptStatus
    reason: str | None
    """Why it failed or was cancelled."""
    result: Any
    """What the turn left: commits, branch, and the agent's result event. Null until it ended."""
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    retrying: Retrying | None = None
    """Set while a turn that has failed waits or is tried again."""


class PromptCreated(Prompt):
    worker_present: bool


class SessionDetail(Session):
    prompts: list[Prompt]
    """The newest, in order: 100 at most, or as many as a megabyte holds."""
    prompts_next: str | None = None
    """The `cursor` of `/sessions/{id}/prompts` for those before; null: these are all."""
    worker_present: bool
    """Whether a worker is there to do the work. If not, the session waits until one starts."""


class PromptPage(Answer):
    prompts: list[Prompt]
    """Newest first."""
    next: str | None
    """The next page's `cursor`; null on the last page."""


class SessionPage(Answer):
    sessions: list[Session]
    next: str | None
    """The next page's `cursor`; null on the last page."""


class Message(Answer):
    seq: int
    """Counts per session from 1; the event stream's id."""
    prompt_id: UUID
    attempt: int
    body: Any
    """One JSON event of the agent, as it came."""
    created_at: datetime


class MessagePage(Answer):
    messages: list[Message]
    next: int | None
    """The next page's `after`; null when there is no more yet."""


class SessionState(Answer):
    """Data of the event `status`."""

    class PromptState(Answer):
        id: UUID
        status: PromptStatus
        reason: str | None

    id: UUID
    title: str
    inbox_status: InboxStatus
    session_status: SessionStatus
    pull_request: PullRequest | None = None
    prompts: list[PromptState]
    """The last hundred."""


class Cancelled(Answer):
    cancelled: int
    """Turns that waited and ended at once."""
    cancelling: int
    """Turns that a worker has yet to stop."""


class RowError(Answer):
    attempt: int
    at: datetime
    error: str
    worker_id: UUID | None


class Row(Answer):
    """A row of the outbox. Borrow tokens are left out of the payload."""

    id: int
    topic: str
    ordering_key: str | None
    payload: Any
    state: Literal["ready", "running", "done", "dead", "cancelled"]
    priority: int
    attempt: int
    failures: int
    max_attempts: int
    worker_id: UUID | None
    unique_key: str | None
    errors: list[RowError]
    available_at: datetime
    cancel_requested_at: datetime | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class RowPage(Answer):
    rows: list[Row]
    next: str | None
    """The next page's `cursor`; null on the last page."""


class Health(Answer):
    status: Literal["alive"]


class Ready(Answer):
    database: bool
    schema_fits: bool
    """Whether this code works on the database's schema."""
    database_schema: Literal["current", "older", "newer"] | None
    """How the schema compares with this code; null: it does not fit, or is not known."""
    listener: bool
    """Whether the connection that feeds the event streams is up."""
    worker_present: bool
    """Whether a worker is there that runs sessions."""
    nothing_stuck: bool
    """Whether no row has been due for longer than OUTWAKE_STUCK_AFTER."""
    stuck: str | None = None
    """What is stuck, and why."""


class FieldError(Answer):
    detail: str
    pointer: str | None = None
    """A place in the body, as the fragment form of a JSON pointer."""
    parameter: str | None = None
    header: str | None = None


class ProblemDetails(BaseModel):
    """RFC 9457."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    type: str
    """`urn:outwake:problem:` and the kind."""
    title: str
    status: int
    detail: str
    errors: list[FieldError] | None = None
