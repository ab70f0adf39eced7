"""Plain files: those of others are checked before they are opened, and our own are written whole or not at all."""

import json
import os
from pathlib import Path
from secrets import token_hex
from typing import Any

_LARGEST = 16 * 2**20  # bytes of a JSON file; indices of thousands of experts come nearest
_DEEPEST = 32  # values in one another; transformers walks them by recursion


def find_file(folder: str | os.PathLike[str], name: str) -> Path | None:
    """Finds a file that a folder itself holds.

    A link may lead elsewhere in the folder, and from a snapshot of the Hub's cache into its blobs, as the Hub's client
    makes them. A link to anywhere else would bring in a file that the folder's author never had.

    Args:
        folder (`str` or `os.PathLike`): The folder.
        name (`str`): The file's name.

    Returns:
        `Path` or `None`: The file; `None` if there is nothing of this name.

    Raises:
        OSError: What has this name is no file: a folder, a pipe, a broken link.
        ValueError: It is a link out of the folder.
    """
    path = Path(folder) / name
    if not path.is_file():
        if os.path.lexists(path):
            raise OSError(f"{str(path)!r} is no file: remove it, and fetch or save the model again.")
        return None
    home, target = Path(folder).resolve(), path.resolve()
    if not (target.is_relative_to(home) or target.parent == _find_blobs(home)):
        raise ValueError(f"{str(path)!r} is a link out of its folder, to {str(target)!r}: put a copy in its place.")
    return path


def _find_blobs(folder: Path) -> Path | None:
    """Where the Hub's cache has the files of a snapshot, `NAME/blobs` for `NAME/snapshots/REVISION`."""
    return folder.parent.with_name("blobs") if folder.parent.name == "snapshots" else None


def read_json(path: Path, *, largest: int = _LARGEST) -> Any:
    """Reads a JSON file.

    Args:
        path (`Path`): The file.
        largest (`int`, *optional*, defaults to 16 MiB): Size that it may have, in bytes: as values in memory it takes
            up to twenty times as many.

    Returns:
        `Any`: What it holds.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no JSON, or of absurd size or depth; names the file.
    """
    if (size := path.stat().st_size) > largest:
        raise ValueError(f"{str(path)!r} has {size:,} bytes, too many for JSON: fetch or save it again.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is damaged, it is no JSON ({error}): fetch or save it again.") from error
    if _is_deep(content):
        raise ValueError(f"{str(path)!r} holds more than {_DEEPEST} values in one another: fetch or save it again.")
    return content


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds one object.

    Args:
        path (`Path`): The file.

    Returns:
        `dict[str, Any]`: The object.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no JSON object, or of absurd size or depth; names the file.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} is damaged, it holds no JSON object: fetch or save it again.")
    return content


def write_whole(path: Path, text: str) -> None:
    """Writes a text file, so that whatever ends the process it is complete or what it was.

    Args:
        path (`Path`): The file.
        text (`str`): What it shall hold.

    Raises:
        OSError: It cannot be written.
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
