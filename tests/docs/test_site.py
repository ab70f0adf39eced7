"""The site says what the sources and the stored results say, and asks no other host for anything."""

import json
import re
from pathlib import Path

import pytest

from mot_hf.training import CorpusArguments, list_recipes
from scripts.docs.results import NOT_RECORDED, find_stored, find_topics
from tests.scripts.running import REPOSITORY

pytestmark = pytest.mark.slow

# What a browser fetches by itself; links that a reader follows may lead elsewhere.
FETCHED = re.compile(
    r'<(?:script|img|iframe|source)\b[^>]*\bsrc="(https?:)?//|<link\b[^>]*\bhref="(https?:)?//[^>]*stylesheet'
)


def test_every_topic_has_a_page_with_its_stored_tables_and_pictures(site: Path) -> None:
    for topic in find_topics():
        page = (site / "results" / topic / "index.html").read_text()
        for stored in find_stored(topic):
            assert stored.path.relative_to(REPOSITORY).as_posix() in page
            assert ("<img" in page) or not stored.picture
            number = next(iter(re.findall(r"\d+\.\d{2,}", stored.table())), "")
            assert number in page
        assert "<table>" in page
        for name in ("date", "commit", "machine", "versions", "command"):
            assert f"<td>{name}</td>" in page


def test_what_a_record_lacks_is_said(tmp_path: Path) -> None:
    (stored,) = find_stored("settings")
    bare = {name: value for name, value in stored.record.items() if name not in ("date", "commit")}
    assert stored._replace(record=bare).origin()["date"] == ""
    known = {"date": "2026-01-02", "commit": "abc", "command": "x --output_dir y -z"}
    new = stored._replace(record={**stored.record, **known})
    assert new.origin() | {"machine": "", "versions": ""} == {
        "date": "2026-01-02", "commit": "abc", "machine": "", "versions": "", "command": "`x -z`"
    }  # fmt: skip
    assert NOT_RECORDED


def test_every_topic_is_in_the_navigation(site: Path) -> None:
    pages = {path.stem for path in (REPOSITORY / "docs" / "results").glob("*.md")} - {"index"}
    assert pages == set(find_topics())


def test_the_reference_has_defaults_types_and_sources(site: Path) -> None:
    page = (site / "reference" / "configuration" / "index.html").read_text()
    text = re.sub(r"<[^>]+>", "", re.sub(r"<details.*?</details>", "", page, flags=re.DOTALL))
    assert "Width F of one expert" in text
    assert "defaults to 50257" in text
    assert "`int`" not in text
    assert "class MoTConfig" in re.sub(r"<[^>]+>", "", page)


def test_commands_and_recipes_are_described(site: Path) -> None:
    commands = (site / "reference" / "commands" / "index.html").read_text()
    for name in ("train", "calibrate", "upcycle", "serve", "inspect"):
        assert f'id="mot-{name}"' in commands
    recipes = (site / "reference" / "recipes" / "index.html").read_text()
    assert all(f">{name}<" in recipes for name in list_recipes())
    assert all(f"--{name}" in recipes for name in CorpusArguments.__dataclass_fields__ if name != "from_recipe")


def test_equations_are_drawn_without_a_script(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert 'class="arithmatex"' not in text, page
    assert list(site.rglob("*mathjax*")) == list(site.rglob("*katex*")) == []


def test_nothing_is_fetched_from_another_host(site: Path) -> None:
    for page in site.rglob("*.html"):
        found = FETCHED.search(page.read_text())
        assert found is None, f"{page}: {found and found[0]}"
    for sheet in site.rglob("*.css"):
        assert "url(http" not in sheet.read_text(), sheet


def test_the_search_finds_messages(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text())
    assert any(
        "start/troubleshooting" in entry["location"] and "group_size" in entry["text"] for entry in index["docs"]
    )
