"""docs/configuration.md is made from the settings class: `python -m tests.unit.test_configuration`."""

from pathlib import Path

from pydantic_core import PydanticUndefined

from outwake.settings import Settings

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"

HEAD = """\
# Configuration

All settings are environment variables, read by `outwake` and `worker` alike. Times are in seconds, sizes in
bytes. A wrong value is one line on stderr and exit status 2.

| variable | default | meaning |
|---|---|---|
"""


def page() -> str:
    """The page as it must be."""
    rows = []
    for field in Settings.model_fields.values():
        default = "required" if field.default is PydanticUndefined else _shown(field.default)
        meaning = (field.description or "").replace("\n", " ")
        rows.append(f"| `{field.alias}` | {default} | {meaning} |\n")
    return HEAD + "".join(rows)


def _shown(value: object) -> str:
    match value:
        case None:
            return "unset"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case _:
            return f"`{value}`"


def test_the_page_tells_every_setting() -> None:
    assert PAGE.read_text() == page(), "run: python -m tests.unit.test_configuration"


def test_every_setting_says_what_it_means() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


if __name__ == "__main__":
    PAGE.write_text(page())
