"""The README: short, with links that lead somewhere, and without them where they would not."""

import re
import runpy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def find_links(text: str) -> set[str]:
    """Relative targets of links and pictures."""
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return {target for target in targets if not target.startswith(("http://", "https://"))}


def test_the_readme_is_short() -> None:
    assert README.count("\n") <= 200


def test_a_published_description_has_no_links_into_the_repository() -> None:
    given: dict[str, Any] = {}
    with patch("setuptools.setup", given.update):
        runpy.run_path(str(ROOT / "setup.py"))
    description = given["long_description"]
    assert find_links(README)
    assert not find_links(description)
    assert "![" not in description
    assert "https://arxiv.org/abs/2310.15961" in description
    assert "More about installing." in description  # the words of a link stay


def test_the_script_draws_the_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    stored = {path.name for path in (ROOT / "docs" / "assets").glob("*.svg")}
    script = runpy.run_path(str(ROOT / "docs" / "assets" / "draw.py"))
    script["save"].__globals__["ASSETS"] = tmp_path
    for name in sorted(path.removesuffix(".svg") for path in stored):
        script["save"](script[f"draw_{name}"](), name)
    assert {path.name for path in tmp_path.iterdir()} == stored
