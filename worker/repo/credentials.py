"""Git credentials: files in the format of git-credential-store(1), one URL a line.

    https://x-access-token:TOKEN@github.com

OUTWAKE_GIT_CREDENTIALS names such a file, for everybody, or a directory with one file a user, named by
the user's id in percent-encoding. They are read when they are needed, so that a rotated one counts.
"""

from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from outwake.worker.errors import TransientError

LIMIT = 64 * 1024


def load_credentials(path: Path | None, user_id: str) -> bytes | None:
    """What to give the sandbox of this user's session; None if there is nothing for this user.

    Raises TransientError if the file can't be read: an operator can help.
    """
    if path is None:
        return None
    try:
        if path.is_dir():
            path = path / _file_name(user_id)
            if not path.is_file():
                return None
        with path.open("rb") as file:
            content = file.read(LIMIT + 1)
    except OSError as error:
        raise TransientError(f"cannot read the Git credentials: {error.strerror}") from error
    if len(content) > LIMIT:
        raise TransientError("cannot read the Git credentials: the file is too large")
    return content.strip() + b"\n" if content.strip() else None


def secrets_in(credentials: bytes | None) -> list[str]:
    """The passwords and tokens, to be hidden wherever they turn up."""
    found = []
    for line in (credentials or b"").decode(errors="replace").splitlines():
        user, _, password = urlsplit(line.strip()).netloc.rpartition("@")[0].partition(":")
        secret = password or user
        found += [secret, unquote(secret)]
    return found


def _file_name(user_id: str) -> str:
    name = quote(user_id, safe="@")
    return name.replace(".", "%2E") if name.startswith(".") else name
