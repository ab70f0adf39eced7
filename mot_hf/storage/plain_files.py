"""Plain files: files of others are checked before they are opened, our own are written whole or not at all."""

import json
import os
from pathlib import Path
from secrets import token_hex
from typing import Any

_LARGEST = 16 * 2**20  # bytes of a JSON file; the largest are indices of thousands of experts
_DEEPEST = 32  # levels of nesting; transformers recurses into the values


def find_file(folder: str | os.PathLike[str], name: str) -> Path | None:
    """Finds a file that is really in a folder.

    A link may point to another file in the folder, or from a snapshot in the Hub's cache to its blobs. A link to
    anywhere else would bring in a file that the author of the folder never had.

    Args:
        folder (`str` or `os.PathLike`): The folder.
        name (`str`): The file's name.

    Returns:
        `Path` or `None`: The file; `None` if nothing has this name.

    Raises:
        OSError: If the name is not that of a file, but of a folder, a pipe or a broken link.
        ValueError: If it is a link out of the folder.
    """
    path = Path(folder) / name
    if not path.is_file():
        if os.path.lexists(path):
            raise OSError(f"{str(path)!r} is not a file: remove it, and fetch or save the model again.")
        return None
    home, target = Path(folder).resolve(), path.resolve()
    if not (target.is_relative_to(home) or target.parent == _find_blobs(home)):
        raise ValueError(f"{str(path)!r} is a link out of its folder, to {str(target)!r}: replace it with a copy.")
    return path


def _find_blobs(folder: Path) -> Path | None:
    """Return the folder of a snapshot's files in the Hub's cache: `NAME/blobs` for `NAME/snapshots/REVISION`."""
    return folder.parent.with_name("blobs") if folder.parent.name == "snapshots" else None


def read_json(path: Path, *, largest: int = _LARGEST) -> Any:
    """Reads a JSON file.

    Args:
        path (`Path`): The file.
        largest (`int`, *optional*, defaults to 16 MiB): Maximum size of the file, in bytes. In memory, its values take
            many times as many.

    Returns:
        `Any`: Its content.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not JSON, or absurdly large or deep. The message names the file.
    """
    if (size := path.stat().st_size) > largest:
        raise ValueError(f"{str(path)!r} has {size:,} bytes, too many for its JSON: fetch or save it again.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is damaged: it is not JSON ({error}). Fetch or save it again.") from error
    if _is_deep(content):
        raise ValueError(f"{str(path)!r} is nested more than {_DEEPEST} levels deep: fetch or save it again.")
    return content


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file with one object.

    Args:
        path (`Path`): The file.

    Returns:
        `dict[str, Any]`: The object.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not a JSON object, or absurdly large or deep. The message names the file.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} is damaged: it is not a JSON object. Fetch or save it again.")
    return content


def write_whole(path: Path, text: str) -> None:
    """Writes a text file in one step: if the process is killed, the file is either complete or unchanged.

    Args:
        path (`Path`): The file.
        text (`str`): Its content.

    Raises:
        OSError: If the file cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.{token_hex(4)}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _is_deep(content: Any) -> bool:
    level = [content]
    for _ in range(_DEEPEST):
        level = [inner for value in level for inner in _values(value) if isinstance(inner, dict | list)]
    return bool(level)


def _values(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
