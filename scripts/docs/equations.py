"""Equations of pages, which arithmatex has marked, as MathML: browsers draw it without a script or fonts."""

import html
import re

from latex2mathml.converter import convert

_MARKED = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">(?:\\\((?P<inline>.*?)\\\)|\\\[(?P<block>.*?)\\\])</(?P=tag)>', re.DOTALL
)


def to_mathml(page: str) -> str:
    """Replaces the LaTeX of a page.

    Args:
        page (`str`): HTML, with `<span class="arithmatex">` for inline and `<div class="arithmatex">` for blocks.

    Returns:
        `str`: HTML with `<math>` in their places.
    """

    def replace(found: re.Match[str]) -> str:
        is_block = found["block"] is not None
        code = html.unescape(found["block"] if is_block else found["inline"]).strip()
        math = convert(code, display="block" if is_block else "inline")
        return f'<div class="equation">{math}</div>' if is_block else math

    return _MARKED.sub(replace, page)
