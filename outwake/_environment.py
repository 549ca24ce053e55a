"""How settings are read from the environment, and from the files that it names."""

import os
import re
from functools import lru_cache
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_settings import PydanticBaseSettingsSource

from outwake.errors import ConfigurationError

_OURS = "OUTWAKE_"
_OWN_FIRST = ("DATABASE_URL", "LISTEN_DATABASE_URL")
"""Names that an application may use for a database of its own: OUTWAKE_ before the name wins."""

_LARGEST_FILE = 64 * 1024


def variable(name: str) -> str:
    """The variable of a setting that names none itself."""
    return _OURS + name.upper()


def variables(field: FieldInfo) -> tuple[str, ...]:
    """The variables from which a setting is read; the first that is set counts. A secret may use a _FILE."""
    name = field.alias or ""
    return (_OURS + name, name) if name in _OWN_FIRST else (name,)


def is_secret(field: FieldInfo) -> bool:
    """Whether a setting may be given by file, and must never be repeated."""
    return not field.repr


class Environment(PydanticBaseSettingsSource):
    """The environment, and the files that it names."""

    def __call__(self) -> dict[str, Any]:
        found = {}
        for field in self.settings_cls.model_fields.values():
            if (found_in := given(field)) is not None:
                found[field.alias or ""] = found_in[1]
        return found

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Part of the interface; only pydantic-settings' own sources use it."""
        raise NotImplementedError


def given(field: FieldInfo) -> tuple[str, str] | None:
    """The variable that gives a setting, and its value. An empty one counts as not set."""
    for name in variables(field):
        text = os.environ.get(name)
        file = f"{name}_FILE"
        path = os.environ.get(file) if is_secret(field) else None
        if text and path:
            raise ConfigurationError(f"{name}: {file} is set too: set one of the two")
        if text:
            return name, text
        if path:
            return file, _content(file, path)
    return None


@lru_cache
def _content(variable: str, path: str) -> str:
    """The content of a file without one newline at its end. Read once, because each job loads the settings.

    Raises ConfigurationError, which repeats neither content nor path: the path may be a secret by mistake.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(_LARGEST_FILE + 1)
        if len(raw) > _LARGEST_FILE:
            raise ConfigurationError(f"{variable}: the file is larger than 64 KiB")
        text = raw.decode()
    except OSError as error:
        raise ConfigurationError(f"{variable}: cannot read the file: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{variable}: the file is not UTF-8") from None
    if not (text := re.sub(r"\r?\n\Z", "", text)):
        raise ConfigurationError(f"{variable}: the file is empty")
    return text
