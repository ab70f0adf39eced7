"""Which files of a model's folder belong on the Hugging Face Hub, and whose code comes with them."""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from mot_hf.modeling.heads_mot import AUTO_MAP
from mot_hf.reporting.card import CARD_NAME
from mot_hf.storage.locking import LOCK_NAME
from mot_hf.storage.model_files import CHAT_TEMPLATES, CODE_FILES, CODE_FOLDER, is_model_file, is_weight_file
from mot_hf.storage.plain_files import find_file, read_object
from mot_hf.storage.saved_model import SavedModel

_MAIN_CODE = frozenset(f"{name.split('.')[0]}.py" for name in AUTO_MAP.values())
_DOCUMENTS = re.compile(
    r"README\.md|report\.html|(LICEN[CS]E|NOTICE|COPYING|CITATION|USE_POLICY|AUTHORS)(\.(md|txt|cff|bib))?"
)
# Files in folders, by the name of the folder.
_IN_FOLDERS = {CHAT_TEMPLATES: re.compile(r"[\w.-]+\.jinja"), ".eval_results": re.compile(r"[\w.-]+\.ya?ml")}
_LINKS = re.compile(r"\]\(\s*<?([^)>\s]+)|(?:src|href)\s*=\s*[\"']([^\"']+)", re.IGNORECASE)
_LINKED = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".pdf", ".md", ".html")
_WITH_CODE = ("config.json", "generation_config.json", "tokenizer_config.json")


def list_files(saved: SavedModel) -> dict[str, Path]:
    """Lists the files of a model's folder that belong to the model.

    These are weights, configuration, tokenizer, code, card, license, the training report, and the pictures and
    documents that the card links to.

    Args:
        saved ([`SavedModel`]): The model.

    Returns:
        `dict[str, Path]`: The files by name.

    Raises:
        OSError: One of these names is a folder, a pipe or a broken link.
        ValueError: A file links out of the folder, or names code that is not the model's.
    """
    folder = saved.reader.folder
    _check_named_code(folder)
    vocabulary = saved.tokenizer.vocab_files_names.values() if saved.tokenizer else ()
    names = {*_list_weights(folder), *(find_code(folder) or ())}
    for name in (path.name for path in folder.iterdir()):
        if inner := _IN_FOLDERS.get(name):
            names |= {f"{name}/{path.name}" for path in (folder / name).glob("*") if inner.fullmatch(path.name)}
        elif name in vocabulary or _is_setting(name) or _DOCUMENTS.fullmatch(name):
            names.add(name)
    found = {name: find_file(folder, name) for name in sorted(names)}
    if card := found.get(CARD_NAME):
        found |= {name: find_file(folder, name) for name in sorted(_find_links(card))}
    return {name: path for name, path in found.items() if path is not None}


def list_others(folder: Path, names: Collection[str]) -> list[str]:
    """Lists what else a folder contains besides some files.

    Args:
        folder (`Path`): The folder.
        names (`Collection[str]`): Names of the files.

    Returns:
        `list[str]`: The other files and folders. Of a folder with some of `names` in it, single files.
    """
    partly = {name.split("/")[0] for name in names if "/" in name}
    others = []
    for path in sorted(folder.iterdir()):
        if path.name in partly:
            inner = [file.relative_to(folder).as_posix() for file in sorted(path.rglob("*")) if not file.is_dir()]
            others += [name for name in inner if name not in names]
        elif path.name not in (*names, LOCK_NAME):
            others.append(f"{path.name}/" if path.is_dir() else path.name)
    return others


def find_code(folder: Path) -> set[str] | None:
    """Finds the code files in a model's folder: those of all heads, and the files beside them that they import.

    Args:
        folder (`Path`): The folder.

    Returns:
        `set[str]` or `None`: Their names; `None` if one is missing.

    Raises:
        OSError: One of these names is a folder, a pipe or a broken link.
        ValueError: One links out of the folder, or imports something that is not beside it.
    """
    found, waiting = set(), set(_MAIN_CODE)
    while waiting:
        name = waiting.pop()
        path = find_file(folder, name)
        if path is None:
            return None
        found.add(name)
        imported = get_relative_imports(path)
        foreign = [module for module in imported if not module.isidentifier()]
        if foreign:
            raise ValueError(
                f"{str(path)!r} imports {foreign[0]!r}, which is not a file beside it and cannot be uploaded with it."
            )
        waiting |= {f"{module}.py" for module in imported} - found
    return found


def find_changed_code(folder: Path, names: Collection[str]) -> list[str]:
    """Finds code files that differ from this package's own.

    Args:
        folder (`Path`): The model's folder.
        names (`Collection[str]`): Names of the code files there.

    Returns:
        `list[str]`: Files that differ, or that this package does not have.
    """
    own = {name: (CODE_FOLDER / name).read_bytes() for name in CODE_FILES}
    return [name for name in sorted(names) if (folder / name).read_bytes() != own.get(name)]


def _is_setting(name: str) -> bool:
    return is_model_file(name) and not is_weight_file(name) and name not in CODE_FILES


def _list_weights(folder: Path) -> set[str]:
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return {SAFE_WEIGHTS_NAME}
    return {SAFE_WEIGHTS_INDEX_NAME, *read_object(folder / SAFE_WEIGHTS_INDEX_NAME)["weight_map"].values()}


def _find_links(card: Path) -> set[str]:
    """Pictures and documents in its folder that the card links to."""
    text = card.read_text(encoding="utf-8", errors="replace")
    targets = [unquote(re.split(r"[?#]", link or other)[0]) for link, other in _LINKS.findall(text)]
    paths = [PurePosixPath(target) for target in targets if ":" not in target and "\0" not in target]
    return {
        path.as_posix()
        for path in paths
        if path.suffix.lower() in _LINKED and not any(part[0] in "./" for part in path.parts)
    }


def _check_named_code(folder: Path) -> None:
    """Refuse configurations that make users run code of another repository, or code that is not uploaded."""
    for file in _WITH_CODE:
        path = find_file(folder, file)
        for field, value in _list_named_code(read_object(path)) if path else ():
            module, _, name = value.partition(".") if isinstance(value, str) else ("", "", "")
            if f"{module}.py" not in _MAIN_CODE or not name.isidentifier():
                raise ValueError(
                    f"{str(path)!r} names {value!r} in `{field}`. This is not the model's own code, and whoever "
                    f"loads the model would run it. Remove `{field}` from the file; the upload adds the right one."
                )


def _list_named_code(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Fields of a configuration that name code, and what they name."""
    auto_map = config.get("auto_map") or {}
    named = list(auto_map.values()) if isinstance(auto_map, dict) else [auto_map]
    for value in named:
        for each in value if isinstance(value, list) else [value]:
            if each is not None:
                yield "auto_map", each
    if pipelines := config.get("custom_pipelines"):
        yield "custom_pipelines", json.dumps(pipelines)
