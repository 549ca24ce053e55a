"""What the environment may say. docs/configuration.md is made from the settings class:
`python -m tests.unit.test_configuration`.
"""

import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from pydantic_core import PydanticUndefined

from outwake._environment import is_secret, variables
from outwake.errors import ConfigurationError
from outwake.settings import Settings, has_database, load
from outwake.url import check_url, libpq_url
from tests.support.process import ROOT

PAGE = ROOT / "docs" / "configuration.md"

FORMS = [
    ("postgresql://u:p@h:5432/x?sslmode=require", "the same"),
    ("postgres://u:p@h/x", "postgresql://u:p@h/x"),
    ("postgresql+psycopg://u:p@h/x", "postgresql://u:p@h/x"),
    ("postgresql+asyncpg://u:p@h/x?ssl=require", "postgresql://u:p@h/x?sslmode=require"),
    ("postgresql://", "the same: `PGHOST`, `PGUSER`, `PGPASSWORD` and the like say all"),
    ("host=h user=u password=p dbname=x", "the same"),
]

HEAD = """\
# Configuration

All settings are environment variables, read by `outwake` and `worker` alike. Times are in seconds, sizes in
bytes. A wrong value is one line on stderr and exit status 2; an empty one counts as not set.

## The database

`OUTWAKE_DATABASE_URL` says where it is, or else `DATABASE_URL`. So an application keeps its own
`DATABASE_URL`. In the same way `OUTWAKE_LISTEN_DATABASE_URL` wins over `LISTEN_DATABASE_URL`.

| written | means |
|---|---|
"""

BELOW = """
In a URL, the characters `% @ : /` and a space of a password are written `%25 %40 %3A %2F %20`. What libpq
cannot read is refused, with exit status 2. It is not repeated: libpq's own messages show the password. A
database that does not answer is exit status 1 of a command; workers and API go on trying.

## Secrets

A variable that is marked `_FILE` may hold a secret. A second one, with `_FILE` behind its name, may name a
file that holds the secret instead: `OUTWAKE_DATABASE_URL_FILE=/run/secrets/database_url`.

- The file is read once, when a process starts. Restart the process after a change.
- It is UTF-8 and at most 64 KiB. One newline at its end does not belong to the secret.
- If the file cannot be read or is empty, or if both variables are set, one line names the variable, and the
  exit status is 2.

No message shows the value of such a variable.

## All settings

| variable | | default | meaning |
|---|---|---|---|
"""


def page() -> str:
    """The page as it must be."""
    forms = "".join(
        f"| `{written}` | {means if means.startswith('the same') else f'`{means}`'} |\n"
        for written, means in FORMS
    )
    rows = []
    for field in Settings.model_fields.values():
        default = "required" if field.default is PydanticUndefined else _shown(field.default)
        meaning = (field.description or "").replace("\n", " ")
        names = ", else ".join(f"`{name}`" for name in variables(field))
        file = "`_FILE`" if is_secret(field) else ""
        rows.append(f"| {names} | {file} | {default} | {meaning} |\n")
    return HEAD + forms + BELOW + "".join(rows)


def _shown(value: object) -> str:
    match value:
        case None | "":
            return "unset"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:.15g}"
        case _:
            return f"`{value}`"


def test_the_page_tells_every_setting() -> None:
    assert PAGE.read_text() == page(), "run: python -m tests.unit.test_configuration"


def test_every_setting_says_what_it_means() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


SECRET = "s3cr3t-passw0rd"

SECRETS = {
    "DATABASE_URL": f"postgresql://u:{SECRET}@h/x",
    "OUTWAKE_DATABASE_URL": f"postgresql://u:{SECRET}@h/x",
    "LISTEN_DATABASE_URL": f"postgresql://u:{SECRET}@h:6432/x",
    "OUTWAKE_LISTEN_DATABASE_URL": f"postgresql://u:{SECRET}@h:6432/x",
    "OUTWAKE_OIDC_CLIENT_SECRET": SECRET,
    "IP_ALLOCATOR_URL": f"http://{SECRET}@h",
    "OUTWAKE_STUCK_WEBHOOK": f"https://h/{SECRET}",
    "OUTWAKE_WEBHOOK_SECRET": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
    "OUTWAKE_RELAY_URL": f"nats://{SECRET}@h:4222",
}
"""A good value of each variable that holds a secret."""


@pytest.fixture(autouse=True)
def _only_a_database(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if "DATABASE_URL" in name or name.startswith("OUTWAKE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("DATABASE_URL", "postgresql://nowhere/x")


def value_of(settings: Settings, variable: str) -> str:
    [name] = [name for name, field in Settings.model_fields.items() if variable in variables(field)]
    value = getattr(settings, name)
    return str(value if isinstance(value, str) else value.get_secret_value())


def test_these_settings_are_secret() -> None:
    found = {
        name for field in Settings.model_fields.values() if is_secret(field) for name in variables(field)
    }
    assert found == set(SECRETS)


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_given_by_a_variable_or_by_a_file(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if name == "DATABASE_URL":
        monkeypatch.delenv(name)
    for variable in (name, f"{name}_FILE"):
        given = SECRETS[name]
        if variable != name:
            monkeypatch.delenv(name)
            (tmp_path / "secret").write_text(given + "\n")
            given = str(tmp_path / "secret")
        monkeypatch.setenv(variable, given)
        settings = load()
        assert value_of(settings, name) == SECRETS[name]
        assert SECRETS[name] not in repr(settings) + str(settings)


@pytest.mark.parametrize("name", sorted(SECRETS.keys() - {"OUTWAKE_OIDC_CLIENT_SECRET"}))
def test_a_secret_that_is_wrong_is_not_repeated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything may be a client's secret."""
    monkeypatch.setenv(name, f"wrong {SECRET}")
    with pytest.raises(ConfigurationError, match=f"^{name}: ") as refused:
        load()
    assert SECRET not in "".join(traceback.format_exception(refused.value))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["DATABASE_URL", "LISTEN_DATABASE_URL"])
def test_our_own_variable_wins(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ours, theirs = "postgresql://ours/x", "postgresql://theirs/x"
    monkeypatch.setenv(name, theirs)
    assert value_of(load(), name) == theirs
    monkeypatch.setenv(f"OUTWAKE_{name}", "")
    assert value_of(load(), name) == theirs
    monkeypatch.setenv(f"OUTWAKE_{name}", ours)
    assert value_of(load(), name) == ours
    monkeypatch.delenv(f"OUTWAKE_{name}")
    (tmp_path / "url").write_text(ours)
    monkeypatch.setenv(f"OUTWAKE_{name}_FILE", str(tmp_path / "url"))
    assert value_of(load(), name) == ours


def test_what_an_application_sets_twice_is_its_own_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL_FILE", "/nowhere")
    monkeypatch.setenv("OUTWAKE_DATABASE_URL", "postgresql://ours/x")
    assert load().database_url == "postgresql://ours/x"


def test_no_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "")
    assert not has_database()
    with pytest.raises(ConfigurationError, match=r"^DATABASE_URL: is not set$"):
        load()


def test_a_listen_url_that_is_empty_makes_no_pooler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_DATABASE_URL", "")
    assert not load().pooled
    monkeypatch.setenv("LISTEN_DATABASE_URL", "postgres://nowhere/x")
    assert not load().pooled  # the same, written in another form
    monkeypatch.setenv("LISTEN_DATABASE_URL", "postgres://elsewhere/x")
    assert load().pooled


def test_what_a_caller_gives_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTWAKE_DATABASE_URL", "postgresql://ours/x")
    monkeypatch.setenv("OUTWAKE_LEASE", "7")
    given = "postgres://given/x"
    by_name = Settings(database_url=given, lease=8)
    by_alias = Settings.model_validate({"DATABASE_URL": given, "OUTWAKE_LEASE": "8"})
    for settings in (by_name, by_alias):
        assert (settings.database_url, settings.lease) == ("postgresql://given/x", 8)


@pytest.mark.parametrize(
    ("content", "secret"),
    [
        ("a", "a"),
        ("a\n", "a"),
        ("a\r\n", "a"),
        ("a\n\n", "a\n"),
        (" a \n", " a "),
        ("é\n", "é"),
        ("a" * 65535 + "\n", "a" * 65535),
    ],
)
def test_one_newline_is_dropped(
    content: str, secret: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_bytes(content.encode())
    monkeypatch.setenv("OUTWAKE_OIDC_CLIENT_SECRET_FILE", str(tmp_path / "secret"))
    assert value_of(load(), "OUTWAKE_OIDC_CLIENT_SECRET") == secret


def refused_file(variable: str) -> str:
    with pytest.raises(ConfigurationError) as refused:
        load()
    text = "".join(traceback.format_exception(refused.value))
    assert SECRET not in text
    name, _, problem = str(refused.value).partition(": ")
    assert name == variable
    return problem


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot read the file: No such file or directory"),
        (b"", "the file is empty"),
        (b"\n", "the file is empty"),
        (SECRET.encode() + b"\xff", "the file is not UTF-8"),
        (SECRET.encode() * 5000, "the file is larger than 64 KiB"),
    ],
)
@pytest.mark.parametrize("name", ["OUTWAKE_DATABASE_URL_FILE", "OUTWAKE_OIDC_CLIENT_SECRET_FILE"])
def test_a_file_that_gives_no_secret(
    name: str, content: bytes | None, problem: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / SECRET  # somebody gave the secret where its file was to be named
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv(name, str(path))
    assert refused_file(name) == problem


def test_a_directory_gives_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DATABASE_URL", "")
    monkeypatch.setenv("DATABASE_URL_FILE", str(tmp_path))
    assert refused_file("DATABASE_URL_FILE") == "cannot read the file: Is a directory"


def test_a_file_that_holds_a_wrong_value_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(f"mysql://u:{SECRET}@h")
    monkeypatch.setenv("OUTWAKE_DATABASE_URL_FILE", str(tmp_path / "secret"))
    assert refused_file("OUTWAKE_DATABASE_URL_FILE") == "must begin with postgresql://"


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_set_in_one_way_only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, SECRETS[name])
    monkeypatch.setenv(f"{name}_FILE", SECRET)
    assert refused_file(name) == f"{name}_FILE is set too: set one of the two"
    monkeypatch.setenv(f"{name}_FILE", "")
    load()


def test_a_file_is_read_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Handlers ask for the settings in every job."""
    path = tmp_path / "secret"
    path.write_text("first")
    monkeypatch.setenv("OUTWAKE_OIDC_CLIENT_SECRET_FILE", str(path))
    assert value_of(load(), "OUTWAKE_OIDC_CLIENT_SECRET") == "first"
    path.unlink()
    assert value_of(load(), "OUTWAKE_OIDC_CLIENT_SECRET") == "first"


def test_what_must_not_be_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    key = SECRETS["OUTWAKE_WEBHOOK_SECRET"]
    (tmp_path / "secret").write_text(f"{key} {key}")
    monkeypatch.setenv("OUTWAKE_WEBHOOK_SECRET_FILE", str(tmp_path / "secret"))
    monkeypatch.setenv("DATABASE_URL", "postgresql://u:p%40ss@h/x")
    assert {key, key.removeprefix("whsec_"), "p@ss", "p%40ss"} <= set(load().secrets)


@pytest.mark.parametrize(("written", "means"), FORMS)
def test_forms_of_a_url_on_the_page(written: str, means: str) -> None:
    url = libpq_url(written)
    assert url == (written if means.startswith("the same") else means)
    check_url(url)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("postgresql+psycopg2://h", "postgresql://h"),
        ("postgresql+psycopg_async://h", "postgresql://h"),
        ("postgres+psycopg://", "postgresql://"),
        ("POSTGRES://h", "postgresql://h"),
        ("postgresql:///x?host=/run/postgresql", "postgresql:///x?host=/run/postgresql"),
        ("postgresql://a:1,[::1]:2/x", "postgresql://a:1,[::1]:2/x"),
        ("postgresql+asyncpg://h/x?ssl=true", "postgresql://h/x?sslmode=require"),
        ("postgresql+asyncpg://h?connect_timeout=3&ssl=prefer",
         "postgresql://h?connect_timeout=3&sslmode=prefer"),
        ("postgresql://u:a?ssl=b@h/x?ssl=false", "postgresql://u:a?ssl=b@h/x?sslmode=disable"),
        ("postgresql://h/x?application_name=ssl=1", "postgresql://h/x?application_name=ssl=1"),
        ("postgresql://h/x?user=me@server", "postgresql://h/x?user=me@server"),
        ("postgresql://u:p%40%2F@h/a%40b", "postgresql://u:p%40%2F@h/a%40b"),
        ("host=h password='a://b c'", "host=h password='a://b c'"),
        ("host=h\n  dbname=x\n", "host=h\n  dbname=x\n"),
    ],
)  # fmt: skip
def test_urls(text: str, url: str) -> None:
    assert libpq_url(text) == url
    assert libpq_url(url) == url
    if "application_name=ssl" not in url:  # libpq wants the second = escaped
        check_url(url)


WRONG = {
    "mysql://u:SECRET@h/x": "must begin with postgresql://",
    "jdbc:postgresql://h/x?password=SECRET": "must begin with postgresql://",
    "postgresql+://u:SECRET@h": "must begin with postgresql://",
    " postgresql://u:SECRET@h/x": "is a URL with a space",
    "postgresql+psycopg://u:SECRET@h/x ": "is a URL with a space",
    "postgresql://u:pass SECRET@h/x": "is a URL with a space",
    "postgresql://u:SECRET\0@h/x": "holds a NUL character",
    "postgresql://u:SECRET%zz@h/x": "is a URL that libpq cannot read",
    "postgresql://u:SECRET%00@h/x": "is a URL that libpq cannot read",
    "postgresql://u:SECRET@[::1/x": "is a URL that libpq cannot read",
    "postgresql+asyncpg://u:SECRET@h/x?prepared_statement_cache_size=0": "has a connection option",
    "postgresql://u:p/x?SECRET=1": "has a connection option",
    "host=h password=SECRET nosuch=x": "has a connection option",
    "postgresql://u:p@SECRET@h/x": "has one @ too many",
    "postgresql://u:p/SECRET@h/x": "has one @ too many",
    "postgresql://u:1/SECRET@h/x": "has one @ too many",
    "postgresql://u:SECRET": "has a port that is not a number",
    "postgresql://u:SECRET/x": "has a port that is not a number",
    "u:SECRET@h/x": "is neither a postgresql:// URL nor",
    "postgresql:u:SECRET@h/x": "is neither a postgresql:// URL nor",
    "host=h password=p SECRET": "is neither a postgresql:// URL nor",
    "host=h password='SECRET": "is neither a postgresql:// URL nor",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_url_is_refused_and_not_repeated(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = text.replace("SECRET", SECRET)
    with pytest.raises(ValueError, match=WRONG[text]) as refused:
        check_url(libpq_url(url))
    assert SECRET not in "".join(traceback.format_exception(refused.value))
    if "\0" not in url:  # no environment can hold one, a file can
        monkeypatch.setenv("OUTWAKE_DATABASE_URL", url)
        with pytest.raises(ConfigurationError, match="^OUTWAKE_DATABASE_URL: " + WRONG[text]):
            load()


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("OUTWAKE_LEASE", "soon", "OUTWAKE_LEASE: .*, not 'soon'"),
        ("OUTWAKE_RETENTION", "inf", "OUTWAKE_RETENTION: "),
        ("OUTWAKE_RETENTION", "1e12", "OUTWAKE_RETENTION: "),
        ("OUTWAKE_LOG_LEVEL", "loud",
         "OUTWAKE_LOG_LEVEL: must be debug, info, warning or error, not 'loud'"),
        ("OUTWAKE_PUBLIC_URL", "x", "OUTWAKE_PUBLIC_URL: .*, not 'x'"),
        ("OUTWAKE_SCHEMA", "Shop", "OUTWAKE_SCHEMA: must be lower-case"),
        ("OUTWAKE_SCHEMA", "public", "OUTWAKE_SCHEMA: public belongs to others"),
        ("OUTWAKE_SCHEMA", "elsewhere", "OUTWAKE_SCHEMA: was changed after"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_one_line(
    name: str, value: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=f"^{problem}") as refused:
        load()
    assert "\n" not in str(refused.value)


def test_the_schema_is_the_one_that_queries_name() -> None:
    code = "from outwake import schema, settings; print(settings.load().schema_name, schema.SCHEMA.name)"
    for value, name in ((None, "outwake"), ("", "outwake"), ("shop_outbox", "shop_outbox")):
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            **({} if value is None else {"OUTWAKE_SCHEMA": value}),
        }
        said = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert said.stdout.split() == [name, name]


if __name__ == "__main__":
    PAGE.write_text(page())


VARIABLES = sorted({name for field in Settings.model_fields.values() for name in variables(field)})


@pytest.mark.parametrize("name", VARIABLES)
def test_an_empty_variable_counts_as_not_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a file of docker compose: `IP_ALLOCATOR_URL=${IP_ALLOCATOR_URL:-}`."""
    for other in VARIABLES:
        monkeypatch.delenv(other, raising=False)
    if "DATABASE_URL" not in name or "LISTEN" in name:
        monkeypatch.setenv("DATABASE_URL", "postgresql://h/x")
    else:
        monkeypatch.setenv(
            "OUTWAKE_DATABASE_URL" if name == "DATABASE_URL" else "DATABASE_URL", "postgresql://h/x"
        )
    expected = load()
    monkeypatch.setenv(name, "")
    assert load() == expected
