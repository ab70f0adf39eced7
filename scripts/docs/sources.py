"""Files of the repository on the site: the package for mkdocstrings, and a page of each file that pages link to."""

import os
import re
import shutil
from pathlib import Path, PurePosixPath

from scripts.docs.generated import Generated

PACKAGE = Path("build", "docs", "mot_hf")  # where mkdocs.yml lets mkdocstrings look
_LINK = re.compile(r"(?<!!)\]\((?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".md": "markdown", ".toml": "toml", ".slurm": "bash"}


def copy_package(root: Path) -> None:
    """Lays out `mot_hf` with the models in it, as only an installation has them. Griffe sees through links.

    Args:
        root (`Path`): The repository.
    """
    shutil.rmtree(root / PACKAGE, ignore_errors=True)
    only_python = shutil.ignore_patterns("__pycache__", "*.yaml", "*.html", "*.md")
    shutil.copytree(root / "mot_hf", root / PACKAGE, ignore=only_python)
    shutil.copytree(root / "modeling", root / PACKAGE / "modeling", ignore=only_python)


def rename_package(html: str) -> str:
    """Gives sources the paths that they have in the repository.

    Args:
        html (`str`): A page.

    Returns:
        `str`: The page without the folder of [`copy_package`].
    """
    return html.replace(f"{PACKAGE}/modeling/", "modeling/").replace(f"{PACKAGE}/", "mot_hf/")


def linked_files(root: Path, docs: Path) -> list[Generated]:
    """Makes a page of each file or folder of the repository that a page of the site links to.

    Args:
        root (`Path`): The repository.
        docs (`Path`): Its folder of pages.

    Returns:
        `list[Generated]`: The pages, without a place in the navigation and in the search.
    """
    targets: set[str] = set()
    for page in docs.rglob("*.md"):
        targets |= find_links(page.read_text(encoding="utf-8"), page.relative_to(docs).as_posix(), root, docs)
    return [Generated(_address(target), _show(root, target)) for target in sorted(targets)]


def find_links(markdown: str, page: str, root: Path, docs: Path) -> set[str]:
    """Finds what a page links to outside of the site.

    Args:
        markdown (`str`): The page.
        page (`str`): Its path below docs/.
        root (`Path`): The repository.
        docs (`Path`): Its folder of pages.

    Returns:
        `set[str]`: Paths of files and folders of the repository.
    """
    found = {_locate(match["target"], page, root, docs) for match in _LINK.finditer(markdown)}
    return {target for target in found if target}


def redirect_links(markdown: str, page: str, root: Path, docs: Path) -> str:
    """Lets links to files of the repository lead to their pages on the site.

    Args:
        markdown (`str`): The page.
        page (`str`): Its path below docs/.
        root (`Path`): The repository.
        docs (`Path`): Its folder of pages.

    Returns:
        `str`: The page with other links.
    """

    def redirect(match: re.Match[str]) -> str:
        target = _locate(match["target"], page, root, docs)
        if target is None:
            return match[0]
        return f"]({os.path.relpath(_address(target), PurePosixPath(page).parent)})"

    return _LINK.sub(redirect, markdown)


def _locate(target: str, page: str, root: Path, docs: Path) -> str | None:
    """The path of a link in the repository, if it leads out of docs/ to something that exists."""
    path = Path(os.path.normpath(docs / PurePosixPath(page).parent / target))
    if path.is_relative_to(docs) or not path.is_relative_to(root) or not path.exists():
        return None
    return path.relative_to(root).as_posix()


def _address(target: str) -> str:
    return f"source/{target}.md"


def _show(root: Path, target: str) -> str:
    path = root / target
    if path.is_dir():
        names = sorted(f"- `{each.name}{'/' if each.is_dir() else ''}`" for each in path.iterdir() if _is_shown(each))
        text = "\n".join(names)
    else:
        text = f"````{_LANGUAGES.get(path.suffix, 'text')}\n{path.read_text(encoding='utf-8')}\n````"
    return f"---\nsearch:\n  exclude: true\nhide:\n  - navigation\n---\n\n# {target}\n\n{text}\n"


def _is_shown(path: Path) -> bool:
    return not path.name.startswith((".", "__pycache__"))
