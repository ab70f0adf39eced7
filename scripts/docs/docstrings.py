"""Docstrings in Hugging Face's format, for griffe's parser of Google's."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import griffe

_REFERENCE_PAGES = Path(__file__).parents[2] / "docs" / "reference"

# "name (`type` of shape `[B, T]`, *optional*, defaults to 5): what it is", also of several names.
_ITEM = re.compile(
    r"^(?P<indent> +)(?P<names>[*\w]+(?:, [*\w]+)*) \((?P<about>(?:[^()]|\([^()]*\))*)\):(?P<rest> .*|)$"
)
_RETURNED = re.compile(r"^(?P<indent> +)(?P<type>`[^`]+`(?: or `[^`]+`)*|\[`\w+`\])(?P<more>[^:]*):(?P<rest> .*)$")
_SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example):\s*$")
_REFERENCE = re.compile(r"\[`(?P<name>[\w.]+)`\](?![\[(])")


class HuggingFaceDocstrings(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = rewrite(obj.docstring.value, keep_defaults=obj.is_class)


def rewrite(text: str, *, keep_defaults: bool = True) -> str:
    """Rewrites a docstring.

    Args:
        text (`str`): A docstring in Hugging Face's format, without indentation.
        keep_defaults (`bool`, *optional*, defaults to `True`): Whether to keep the defaults beside the types. A
            function's are read from its signature.

    Returns:
        `str`: The docstring in Google's format.
    """
    section, lines, is_fenced = "", [], False
    for line in text.split("\n"):
        is_fenced = is_fenced != line.lstrip().startswith("```")
        if found := _SECTION.match(line):
            section = found[1]
        elif line and not line.startswith(" "):
            section = ""
        lines += [line] if is_fenced else _rewrite_line(line, section, keep_defaults)
    return "\n".join(lines)


def _rewrite_line(line: str, section: str, keep_defaults: bool) -> list[str]:
    if section in ("Args", "Attributes") and (found := _ITEM.match(line)):
        about = _plain(found["about"] if keep_defaults else found["about"].partition(", *optional*")[0])
        rest = _link(found["rest"])
        return [f"{found['indent']}{name} ({about}):{rest}" for name in found["names"].split(", ")]
    if section in ("Returns", "Yields") and (found := _RETURNED.match(line)):
        rest = _link(found["rest"])
        return [f"{found['indent']}{_plain(found['type'] + found['more'])}:{rest}"]
    return [_link(line)]


def _plain(text: str) -> str:
    """A type without marks of Markdown."""
    return _REFERENCE.sub(r"\g<name>", text).replace("`", "").replace("*", "")


def _link(text: str) -> str:
    """Let names in brackets lead to where the reference describes them."""
    return _REFERENCE.sub(_make_link, text)


def _make_link(found: re.Match[str]) -> str:
    *_, head, name = ["", *found["name"].split(".")]
    documented = _find_documented()
    if name in documented:
        return f"[`{found['name']}`][{documented[name]}]"
    if head in documented:
        return f"[`{found['name']}`][{documented[head]}.{name}]"
    return f"`{found['name']}`"


@cache
def _find_documented() -> dict[str, str]:
    """Full names of the objects that the pages of the reference have, by their last parts."""
    texts = [page.read_text(encoding="utf-8") for page in sorted(_REFERENCE_PAGES.glob("*.md"))]
    names = [name for text in texts for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)]
    return {name.rpartition(".")[2]: name for name in names}
