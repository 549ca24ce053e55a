"""Converts an agent's Markdown to HTML that is safe in a page: no raw HTML, images or inline styles.

Some texts take the parser a time that grows with the square of their length. So each step of the parser looks
at the clock, and a text that has used up its time is not converted.
"""

import time
from collections.abc import Callable
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.ruler import Ruler
from markdown_it.rules_core import StateCore

TEXT_SECONDS = 0.05  # of the thread's CPU
PAGE_SECONDS = 0.25


class _TooCostlyError(Exception):
    pass


class Budget:
    """The time that the texts of one page may take. It belongs to the thread that spends it."""

    def __init__(self, seconds: float = PAGE_SECONDS) -> None:
        self.ends = time.thread_time() + seconds
        self.refused = 0
        """How many texts were not converted."""


def _without_style(state: StateCore) -> None:
    """Remove the style attribute of aligned table cells, which the page's policy forbids."""
    for token in state.tokens:
        token.attrs.pop("style", None)


def _timed(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The rule, which ends the conversion when its time is over."""

    def run(state: Any, *args: Any) -> Any:
        if time.thread_time() > state.env["ends"]:
            raise _TooCostlyError
        return rule(state, *args)

    return run


def _parser() -> MarkdownIt:
    parser = MarkdownIt("js-default", {"html": False, "breaks": True}).disable("image")
    parser.core.ruler.push("without_style", _without_style)
    rulers: list[Ruler[Any]] = [
        parser.core.ruler,
        parser.block.ruler,
        parser.inline.ruler,
        parser.inline.ruler2,
    ]
    for ruler in rulers:
        for rule in ruler.__rules__:
            rule.fn = _timed(rule.fn)
    return parser


_MARKDOWN = _parser()


def to_html(text: str, budget: Budget | None = None) -> str:
    """Safe HTML: all HTML in the text is escaped. Empty if the text is too costly to convert."""
    budget = budget or Budget()
    ends = min(budget.ends, time.thread_time() + TEXT_SECONDS)
    try:
        return str(_MARKDOWN.render(text, {"ends": ends}))
    except (_TooCostlyError, RecursionError):
        budget.refused += 1
        return ""
