"""Where text comes from: files, folders, globs, and data sets of any kind."""

import contextlib
import glob
import hashlib
import itertools
import logging
import os
import platform
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aiohttp import ClientError
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset, load_from_disk
from datasets.data_files import FILES_TO_IGNORE, SPLIT_KEYWORDS
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HFValidationError

from mot_hf.data.rows import COMPRESSIONS, is_text, row_kind

logger = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]
FileSource = PathLike | Sequence[PathLike] | Mapping[str, Path]
DataSet = Dataset | DatasetDict | IterableDataset | IterableDatasetDict

_URL_SCHEMES = ("http://", "https://", "hf://")
_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "json": ("json", {}),
    "csv": ("csv", {"keep_default_na": False}),
    "tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    "parquet": ("parquet", {}),
}

# What lies beside rows and says something about them, such as Spark's `_SUCCESS`.
_ABOUT_ROWS = re.compile(
    r"(readme|licen[cs]e|notice|citation|changelog|checksums|(md5|sha\d+)sums?)\b.*|_.*|.*\.(md5|sha\d+|crc|asc|sig)",
    re.IGNORECASE,
)
_OF_ROWS = {name for name in FILES_TO_IGNORE if row_kind(name)}
_SPLITS = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}
_NUM_NAMED = 3  # files that a message names
_NUM_CHARACTERS = 1000  # of a message of others


class SourceFile(NamedTuple):
    """A file that text is read from, and what changes with its content.

    Args:
        name (`str`): Posix path relative to the folder it was found in.
        path (`str`): Absolute path.
        kind (`str`, *optional*): Kind of its rows, see [`mot_hf.data.rows.row_kind`]; `None` for a text.
        size (`int`): Size in bytes.
        modified (`int`): When it was modified, in nanoseconds.
    """

    name: str
    path: str
    kind: str | None
    size: int
    modified: int


def find_place(key: bytes) -> float:
    """Gives a name or a text its place between 0 and 1, by a stable hash."""
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") / 2**64


def is_held_out(key: bytes, validation_fraction: float) -> bool:
    """Tells by a stable hash of a name or a text whether it belongs to the validation split."""
    return find_place(key) < validation_fraction


def is_data_set(source: object, config_name: str | None = None) -> bool:
    """Tells whether a source is a data set, or the name or address of one, and not files.

    A folder is a data set if one of its configurations is asked for.
    """
    if isinstance(source, DataSet):
        return True
    if not isinstance(source, str | os.PathLike):
        return False
    name = os.fspath(source)
    path = Path(name).expanduser()
    if name.startswith(_URL_SCHEMES) or _is_saved_data_set(path) or (config_name is not None and path.is_dir()):
        return True
    is_local = row_kind(name) or glob.has_magic(name) or path.exists()
    return isinstance(source, str) and not is_local


def _is_saved_data_set(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()
    )


def name_source(source: PathLike | Sequence[PathLike] | None) -> str:
    """Names a source of text in words that others may read: a file or folder without the path to it.

    Args:
        source (`str` or `list[str]`, *optional*):
            File, folder, glob, address or data set, or a list of these; `None` for Python's standard library.

    Returns:
        `str`: The name.
    """
    if source is None:
        return f"the standard library of Python {platform.python_version()}"
    if not isinstance(source, str | os.PathLike):
        return _list_names([name_source(item) for item in source])
    name = os.fspath(source)
    path = Path(name).expanduser()
    if name.startswith(_URL_SCHEMES) or not (row_kind(name) or glob.has_magic(name) or path.exists()):
        return name
    return path.name or path.resolve().name


def count(number: int, noun: str) -> str:
    """Says how many there are of something."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _list_names(names: Collection[str]) -> str:
    rest = len(names) - _NUM_NAMED
    return ", ".join(itertools.islice(names, _NUM_NAMED)) + (f" and {rest} more" if rest > 0 else "")


def load_data_set(
    source: PathLike | DataSet,
    config_name: str | None,
    cache_dir: str | None = None,
    streaming: bool = False,
    argument: str = "source",
) -> DataSet:
    """Loads a data set by its name, from a URL or from a folder that it was saved in.

    Raises:
        ValueError: The data set cannot be read, or has no such configuration.
        OSError: There is no such data set.
    """
    if isinstance(source, DataSet):
        return source
    name = os.fspath(source)
    folder = Path(name).expanduser()
    with explain_errors(f"`{argument}={name!r}`"):
        if _is_saved_data_set(folder):
            return load_from_disk(str(folder))
        kind = row_kind(name.partition("?")[0])
        if kind is None or not name.startswith(_URL_SCHEMES):
            return load_dataset(name, config_name, cache_dir=cache_dir, streaming=streaming)
        builder, options = _BUILDERS[kind]
        return load_dataset(builder, data_files={"train": name}, cache_dir=cache_dir, streaming=streaming, **options)


@contextlib.contextmanager
def explain_errors(source: str) -> Iterator[None]:
    """Ends in one line of `ValueError` or `OSError` what `datasets` raises for a source that it cannot read."""
    try:
        yield
    except ClientError as error:
        raise OSError(f"Downloading {source} was interrupted: check the network and start again ({error}).") from error
    except (OSError, HFValidationError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of a file or a disk, not of a name
            raise
        raise OSError(
            f"{source} is neither an existing file or folder nor a data set that `load_dataset` finds: "
            f"check the path, or the name and the network ({_in_one_line(error)})."
        ) from error
    except DatasetsError as error:
        cause: BaseException = error
        while isinstance(cause, DatasetsError) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, OSError):
            raise cause from None
        raise ValueError(_in_one_line(cause)) from None
    except ValueError as error:
        raise ValueError(_in_one_line(error)) from None


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:_NUM_CHARACTERS] or repr(error)


def find_files(
    source: FileSource, argument: str = "source", leave_out: Collection[str] = ()
) -> dict[str, list[SourceFile]]:
    """Lists the files of a path, a glob or a list of these by their splits, each once.

    A folder has the splits that the names of its files of rows say, as `datasets` reads them: `train.jsonl`,
    `data/test-00000.parquet`. Files of text are of other splits than `"train"` only where every one says its split.

    Args:
        source (`FileSource`): Files, folders and globs, or files by their names.
        argument (`str`, *optional*, defaults to `"source"`): What errors call the source.
        leave_out (`Collection[str]`, *optional*): Paths of files that are held out already.

    Returns:
        `dict[str, list[SourceFile]]`: Files by the name of their split.

    Raises:
        ValueError: A file that is named is no text, or a folder or glob mixes texts and rows.
        OSError: A path or glob matches no file.
    """
    if isinstance(source, Mapping):
        return {"train": [_describe(name, path) for name, path in source.items()]}
    items = [source] if isinstance(source, str | os.PathLike) else list(source)
    splits: dict[str, list[SourceFile]] = {}
    known: set[str] = set()
    held_out = {os.path.realpath(path) for path in leave_out}
    for item in items:
        for split, files in _find_item(item, f"`{argument}={_show(item)}`").items():
            new = [file for file in files if file.path not in known]
            known.update(file.path for file in new)
            splits.setdefault(split, []).extend(new)
    if not splits:
        raise _no_match(f"`{argument}={source!r}`")
    chosen = {
        split: [file for file in files if os.path.realpath(file.path) not in held_out]
        for split, files in splits.items()
    }
    if num_held_out := sum(map(len, splits.values())) - sum(map(len, chosen.values())):
        logger.warning(
            "%s of `%s` are in `validation_source` too and held out.", count(num_held_out, "file"), argument
        )
    if not any(chosen.values()):
        raise ValueError(f"All files of `{argument}` are in `validation_source` too: name other text.")
    return {split: files for split, files in chosen.items() if files}


def _show(item: PathLike) -> str:
    return repr(os.fspath(item))


def _find_item(item: PathLike, label: str) -> dict[str, list[SourceFile]]:
    path = Path(item).expanduser()
    if path.is_file():
        file = _describe(path.name, path)
        if file.kind is None and not is_text(file.path):
            raise ValueError(f"{label} is no text: convert it, or leave it out.")
        return {"train": [file]}
    found = [_describe(name, match) for name, match in (_list_folder(path) if path.is_dir() else _list_glob(path))]
    if not found:
        raise _no_match(label)
    files = _choose_files(item, found, label)
    return _group_by_split(files, label) if path.is_dir() else {"train": files}


def _no_match(label: str) -> FileNotFoundError:
    return FileNotFoundError(f"{label} matches no file: check the path or the glob.")


def _describe(name: str, path: Path) -> SourceFile:
    stat = path.stat()
    return SourceFile(name, os.path.abspath(path), row_kind(name), stat.st_size, stat.st_mtime_ns)


def _list_folder(folder: Path) -> list[tuple[str, Path]]:
    names = sorted(match.relative_to(folder) for match in folder.rglob("*") if match.is_file())
    return [(name.as_posix(), folder / name) for name in names if not _is_hidden(name)]


def _list_glob(path: Path) -> list[tuple[str, Path]]:
    root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    return [(match.relative_to(root).as_posix(), match) for match in matches if match.is_file()]


def _is_hidden(name: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in name.parts)


def _choose_files(item: PathLike, files: list[SourceFile], label: str) -> list[SourceFile]:
    """The texts or the rows among the files of a folder or a glob."""
    rows = [file for file in files if file.kind and Path(file.name).name not in _OF_ROWS]
    texts = [file for file in files if not file.kind and not (rows and _ABOUT_ROWS.fullmatch(Path(file.name).name))]
    others = [file for file in texts if not is_text(file.path)]
    texts = [file for file in texts if file not in set(others)]
    if others:
        logger.warning(
            "%s of %s are no text and left out: %s.", count(len(others), "file"), label, _list_files(others)
        )
    if rows and texts:
        raise ValueError(
            f"{label} mixes {count(len(texts), 'text file')} ({_list_files(texts)}) with {count(len(rows), 'file')} "
            f"of rows ({_list_files(rows)}): name one kind by a glob, such as {_suggest_glob(item, texts[0])!r} or "
            f"{_suggest_glob(item, rows[0])!r}."
        )
    if not rows and not texts:
        raise ValueError(f"{label} holds no text: give text files or files of rows.")
    return rows or texts


def _list_files(files: list[SourceFile]) -> str:
    return _list_names([repr(file.name) for file in files])


def _suggest_glob(item: PathLike, file: SourceFile) -> str:
    folder = Path(item) if Path(item).expanduser().is_dir() else Path(file.path).parent
    suffixes = Path(file.name).suffixes
    is_compressed = bool(suffixes) and suffixes[-1].lower() in COMPRESSIONS
    return str(folder / "**" / f"*{''.join(suffixes[-1 - is_compressed :])}")


def _group_by_split(files: list[SourceFile], label: str) -> dict[str, list[SourceFile]]:
    splits: dict[str | None, list[SourceFile]] = {}
    for file in files:
        words = re.split(r"[-._ 0-9/]+", file.name.lower())  # as `datasets` parts them
        splits.setdefault(next((_SPLITS[word] for word in words if word in _SPLITS), None), []).append(file)
    rest = splits.pop(None, [])
    if not files[0].kind and (rest or "train" not in splits):
        return {"train": files}
    if rest and "train" in splits:
        logger.warning(
            "%s has a training split by the names of its files; %s are of no split and left out: %s.",
            label,
            count(len(rest), "file"),
            _list_files(rest),
        )
    elif rest:
        splits["train"] = rest
    return {str(name): splits[name] for name in splits}
