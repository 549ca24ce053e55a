"""The URL of a database, in the forms that people write and in libpq's.

It may hold a password, so no error of this module repeats any part of it. libpq's own errors do.
"""

import re
from urllib.parse import unquote

import psycopg
from psycopg.conninfo import conninfo_to_dict

_ANY_URL = re.compile(r"\s*[^\s=]*://")
_SCHEME = re.compile(r"postgres(?:ql)?(?:\+\w+)?://", re.IGNORECASE | re.ASCII)
# As libpq splits it: user and password end at the first @ before a slash, so they may contain a ?.
_PARTS = re.compile(r"(?P<user>[^/@]*@)?(?P<host>[^/?]*)(?P<path>[^?]*)(?P<query>.*)")
_SSL = re.compile(r"(?<=[?&])ssl=([^&]*)")
_USERS = re.compile(r"\b(\w[\w+.-]{0,30})://([^/@\s]*)@")
_TOKENS_FOR = ("http", "https", "nats", "tls")  # schemes whose user may be a token
_KEYWORD = re.compile(r"\bpassword=(?:'((?:[^'\\]|\\.)*)'|([^'\s&]+))")
_SSL_MODES = {"true": "require", "false": "disable"}
_UNKNOWN_OPTION = ("invalid URI query parameter", "invalid connection option")
_ESCAPED = "in a password, % is written %25, @ %40, : %3A, / %2F, a space %20"


def libpq_url(text: str) -> str:
    """Convert a database URL from SQLAlchemy's or a hosting service's form to libpq's.

    `postgresql+asyncpg://h/x?ssl=require` becomes `postgresql://h/x?sslmode=require`. libpq's other form,
    `host=h dbname=x`, stays as it is. Raises ValueError.
    """
    if "\0" in text:
        raise ValueError("holds a NUL character")
    if not _ANY_URL.match(text):
        return text
    if re.search(r"\s", text):
        raise ValueError(f"is a URL with a space; {_ESCAPED}")
    if (scheme := _SCHEME.match(text)) is None:
        raise ValueError("must begin with postgresql://")
    parts = _PARTS.fullmatch(text[scheme.end() :])
    assert parts is not None  # each part may be empty
    # libpq would take a part of the password for a host or database name, and its errors show those.
    if "@" in parts["host"] + parts["path"]:
        raise ValueError(f"has one @ too many; {_ESCAPED}")
    query = _SSL.sub(lambda found: f"sslmode={_SSL_MODES.get(found[1], found[1])}", parts["query"])
    return f"postgresql://{parts['user'] or ''}{parts['host']}{parts['path']}{query}"


def secrets_of_url(text: str) -> list[str]:
    """The passwords in a text of one or more URLs, as they are written and decoded; in libpq's other form the
    value of `password`. A user without a password is a token where that is usual.
    """
    found = [quoted or plain for quoted, plain in _KEYWORD.findall(text)]
    for scheme, user in _USERS.findall(text):
        name, _, password = user.partition(":")
        found.append(password or (name if scheme in _TOKENS_FOR else ""))
    return [spelled for secret in found for spelled in {secret, unquote(secret)} if spelled]


def check_url(url: str) -> None:
    """Raise ValueError unless libpq understands the result of `libpq_url`."""
    try:
        found = conninfo_to_dict(url)
    except psycopg.Error as error:
        if str(error).startswith(_UNKNOWN_OPTION):
            problem = "has a connection option that libpq does not know"
        elif _SCHEME.match(url):
            problem = "is a URL that libpq cannot read"
        else:
            problem = "is neither a postgresql:// URL nor libpq's keyword=value pairs"
        raise ValueError(f"{problem}; {_ESCAPED}") from None
    for port in str(found.get("port") or "").split(","):
        if port and not (port.isdecimal() and 0 < int(port) < 65536):
            raise ValueError(f"has a port that is not a number between 1 and 65535; {_ESCAPED}")
