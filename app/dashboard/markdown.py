"""Converts an agent's Markdown to HTML that is safe in a page: no raw HTML, images or inline styles."""

from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore


def _without_style(state: StateCore) -> None:
    """Remove the style attribute of aligned table cells, which the page's policy forbids."""
    for token in state.tokens:
        token.attrs.pop("style", None)


_MARKDOWN = MarkdownIt("js-default", {"html": False, "breaks": True}).disable("image")
_MARKDOWN.core.ruler.push("without_style", _without_style)


def to_html(text: str) -> str:
    """Safe HTML: all HTML in the text is escaped."""
    return str(_MARKDOWN.render(text))
