"""The code blocks of pages: fenced ones anywhere, and indented ones where they are code."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.scripts.running import REPOSITORY

PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
COMMANDS = ("bash", "sh", "shell", "console")

_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,}) *\{?\.?(?P<language>[\w+-]*)")
_LEFT_OUT = re.compile(r"^\s*<!-- not run: (?P<reason>\S.*) -->\s*$")
_NESTED = re.compile(r"^(!!!|\?\?\?|===|[-*+] |\d+\. |:   )")  # what is indented below these is text


class Block(NamedTuple):
    """A code block.

    Args:
        page (`Path`): The page.
        line (`int`): Number of its first line of code.
        language (`str`): The word behind the fence, or "" for indented code.
        text (`str`): The code, without indentation.
        reason (`str`, *optional*): Why it is not run, if a comment on the line before says so.
    """

    page: Path
    line: int
    language: str
    text: str
    reason: str | None

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return (
            f"{self.page.relative_to(REPOSITORY) if self.page.is_relative_to(REPOSITORY) else self.page}:{self.line}"
        )


def find_blocks(page: Path) -> list[Block]:
    """Finds the code blocks of a page."""
    return list(read_blocks(page, page.read_text(encoding="utf-8")))


def read_blocks(page: Path, text: str) -> Iterator[Block]:
    """Reads the code blocks of a text in Markdown."""
    lines = text.split("\n")
    number, reason, is_nested = 0, None, False
    while number < len(lines):
        line = lines[number]
        if found := _FENCE.match(line):
            end = _find_end(lines, number + 1, found["fence"])
            code = [each.removeprefix(found["indent"]) for each in lines[number + 1 : end]]
            yield Block(page, number + 2, found["language"], "\n".join(code), reason)
            number, reason = end, None
        elif found := _LEFT_OUT.match(line):
            reason = found["reason"]
        elif line.startswith("    ") and not is_nested and (number == 0 or not lines[number - 1].strip()):
            end = next((n for n in range(number, len(lines)) if lines[n].strip() and lines[n][:4].strip()), len(lines))
            code = [each.removeprefix("    ") for each in lines[number:end]]
            yield Block(page, number + 1, "", "\n".join(code).rstrip(), reason)
            number, reason = end - 1, None
        elif line.strip():
            reason = None
            if not line.startswith(" "):
                is_nested = _NESTED.match(line) is not None
        number += 1


def _find_end(lines: list[str], start: int, fence: str) -> int:
    return next((n for n in range(start, len(lines)) if lines[n].strip() == fence), len(lines))
