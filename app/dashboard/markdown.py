"""An agent's Markdown as HTML that may stand in a page: no raw HTML, no images, no inline style."""

from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore


def _without_style(state: StateCore) -> None:
    """Aligned table cells have a style attribute, which the page's policy refuses."""
    for token in state.tokens:
        token.attrs.pop("style", None)


_MARKDOWN = MarkdownIt("js-default", {"html": False, "breaks": True}).disable("image")
_MARKDOWN.core.ruler.push("without_style", _without_style)


def to_html(text: str) -> str:
    """Safe to be marked as such: whatever the text holds comes out escaped."""
    return str(_MARKDOWN.render(text))
