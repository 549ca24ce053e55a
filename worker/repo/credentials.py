"""Git credentials: files in the format of git-credential-store(1), one URL a line.

    https://x-access-token:TOKEN@github.com

OUTWAKE_GIT_CREDENTIALS names such a file, for all users, or a directory with one file per user. A file's name
is the user's id in percent-encoding. Each use reads the file again, so a rotated credential takes effect.
"""

from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from outwake.worker.errors import TransientError

LIMIT = 64 * 1024
LONGEST_NAME = 255  # bytes of a file's name; a user whose name is longer has no file


def load_credentials(path: Path | None, user_id: str) -> bytes | None:
    """The credentials for the sandbox of this user's session; None if this user has none.

    Raises TransientError if the file can't be read, because an operator can correct that.
    """
    if path is None:
        return None
    try:
        if path.is_dir():
            name = _file_name(user_id)
            path = path / name
            if len(name) > LONGEST_NAME or not path.is_file():
                return None
        with path.open("rb") as file:
            content = file.read(LIMIT + 1)
    except OSError as error:
        raise TransientError(f"cannot read the Git credentials: {error.strerror}") from error
    if len(content) > LIMIT:
        raise TransientError("cannot read the Git credentials: the file is too large")
    return content.strip() + b"\n" if content.strip() else None


def secrets_in(credentials: bytes | None) -> list[str]:
    """The passwords and tokens, which must be hidden in all output."""
    found = []
    for line in (credentials or b"").decode(errors="replace").splitlines():
        user, _, password = urlsplit(line.strip()).netloc.rpartition("@")[0].partition(":")
        secret = password or user
        found += [secret, unquote(secret)]
    return found


def token_for(host: str, credentials: bytes | None) -> str | None:
    """The password, or the token, of the first line for this host over https; None if there is none."""
    for line in (credentials or b"").decode(errors="replace").splitlines():
        scheme, _, rest = line.strip().partition("://")
        login, at, named = rest.partition("/")[0].rpartition("@")
        if scheme == "https" and at and named.lower().removesuffix(":443") == host:
            user, _, password = login.partition(":")
            return unquote(password or user) or None
    return None


def _file_name(user_id: str) -> str:
    name = quote(user_id, safe="@")
    return name.replace(".", "%2E") if name.startswith(".") else name
