"""Hooks of mkdocs: a marker such as `<!-- results: layer -->` in a page is replaced by what the sources say."""

import mot_cli  # noqa: F401  # isort: skip  # first: it silences other libraries

import re
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

from scripts.docs import commands, equations, messages, notebooks, recipes, results, sources

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

MAKERS: dict[str, Callable[[str], str]] = {
    "commands": lambda _: commands.describe(),
    "fields": recipes.describe_fields,
    "messages": lambda _: messages.describe(),
    "recipes": lambda _: recipes.describe_recipes(),
    "results": results.describe,
    "results table": lambda _: results.list_topics(),
}
_MARKER = re.compile(rf"^<!-- ({'|'.join(sorted(MAKERS, reverse=True))})(?:: (\S+))? -->$", re.MULTILINE)


def on_startup(command: str, dirty: bool) -> None:
    """Lay out the package as it is installed, for mkdocstrings, which ignores folders that do not exist yet."""
    sources.copy_package(ROOT)


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add pictures of results, the notebooks, and files of the repository that pages link to."""
    for file in [*results.pictures(), *notebooks.pages(DOCS / "notebooks"), *sources.linked_files(ROOT, DOCS)]:
        files.append(file.as_page(config))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the markers, and let links to files of the repository lead to their pages."""
    filled = _MARKER.sub(lambda found: MAKERS[found[1]](found[2] or ""), markdown)
    return sources.redirect_links(filled, page.file.src_uri, ROOT, DOCS)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write equations as MathML, and paths of sources as the repository has them."""
    return sources.rename_package(equations.to_mathml(html))
