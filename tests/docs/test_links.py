"""Links of pages outside of the site lead to files and headings that exist; mkdocs checks those of the site."""

import re
from pathlib import Path

import pytest

from tests.scripts.running import REPOSITORY

PAGES = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:href|src|srcset)=\"([^\"\s]+)")


def anchors(page: Path) -> set[str]:
    """The anchors that a host of repositories makes of headings."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found[name] = found.get(name, -1) + 1
    return {name if number == 0 else f"{name}-{number}" for name, last in found.items() for number in range(last + 1)}


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for first, second in LINK.findall(page.read_text(encoding="utf-8")):
        target, _, anchor = (first or second).partition("#")
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path = page.parent / target if target else page
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path)):
            wrong.append(first or second)
    assert not wrong, f"{page.name}: {wrong}"
