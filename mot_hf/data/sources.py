"""Sources of text: files, folders, globs, and data sets of any kind."""

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

# Files that describe the rows beside them, such as Spark's `_SUCCESS`.
_ABOUT_ROWS = re.compile(
    r"(readme|licen[cs]e|notice|citation|changelog|checksums|(md5|sha\d+)sums?)\b.*|_.*|.*\.(md5|sha\d+|crc|asc|sig)",
    re.IGNORECASE,
)
_OF_ROWS = {name for name in FILES_TO_IGNORE if row_kind(name)}
_SPLITS = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}
_NUM_NAMED = 3  # files named in a message
_NUM_CHARACTERS = 1000  # of another library's message


class SourceFile(NamedTuple):
    """A file of text: where it is, and attributes that change with its content.

    Args:
        name (`str`): Posix path relative to the folder in which it was found.
        path (`str`): Absolute path.
        kind (`str`, *optional*): Kind of its rows, see [`mot_hf.data.rows.row_kind`]; `None` for text.
        size (`int`): Size in bytes.
        modified (`int`): Time of its last modification, in nanoseconds.
    """

    name: str
    path: str
    kind: str | None
    size: int
    modified: int


def find_place(key: bytes) -> float:
    """Maps a name or a text to a place between 0 and 1, by a stable hash."""
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") / 2**64


def is_held_out(key: bytes, validation_fraction: float) -> bool:
    """Decides by a stable hash whether a name or a text belongs to the validation split."""
    return find_place(key) < validation_fraction


def is_data_set(source: object, config_name: str | None = None) -> bool:
    """Checks whether a source is a data set, or the name or URL of one, and not files.

    A folder is a data set if a configuration is given.
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


def locate_source(source: PathLike | Sequence[PathLike] | None) -> str | list[str] | None:
    """Names a source of text so that it is found from any working folder: files and folders by absolute paths.

    Args:
        source (`str` or `list[str]`, *optional*): See [`name_source`].

    Returns:
        `str`, `list[str]` or `None`: The source.
    """
    if source is None:
        return None
    if not isinstance(source, str | os.PathLike):
        return [str(locate_source(item)) for item in source]
    name = os.fspath(source)
    return os.path.abspath(Path(name).expanduser()) if _is_path(name) else name


def _is_path(name: str) -> bool:
    """Whether a name is a path or a glob, and not a URL or the name of a data set."""
    is_local = row_kind(name) or glob.has_magic(name) or Path(name).expanduser().exists()
    return bool(is_local) and not name.startswith(_URL_SCHEMES)


def name_source(source: PathLike | Sequence[PathLike] | None) -> str:
    """Names a source of text for other readers: a file or folder without its path.

    Args:
        source (`str` or `list[str]`, *optional*):
            File, folder, glob, URL or name of a data set, or a list of these; `None` for Python's standard library.

    Returns:
        `str`: The name.
    """
    if source is None:
        return f"the standard library of Python {platform.python_version()}"
    if not isinstance(source, str | os.PathLike):
        return _list_names([name_source(item) for item in source])
    name = os.fspath(source)
    path = Path(name).expanduser()
    return path.name or path.resolve().name if _is_path(name) else name


def count(number: int, noun: str) -> str:
    """Writes a number with its noun, in the plural unless it is 1."""
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
    """Loads a data set by its name, from a URL, or from the folder where it was saved.

    Raises:
        ValueError: If the data set cannot be read, or has no such configuration.
        OSError: If there is no such data set.
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
    """Turns the errors of `datasets` for a source that it cannot read into a `ValueError` or `OSError` of one line."""
    try:
        yield
    except ClientError as error:
        raise OSError(
            f"The download of {source} was interrupted: check the network and start again ({error})."
        ) from error
    except (OSError, HFValidationError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # from a file or a disk, not from a name
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
    """Lists the files of a path, a glob or a list of these by their splits, each file once.

    The names of a folder's files of rows determine its splits, by the rules of `datasets`: `train.jsonl`,
    `data/test-00000.parquet`. Text files all belong to `"train"`, unless every name gives a split.

    Args:
        source (`FileSource`): Files, folders and globs, or a mapping from names to files.
        argument (`str`, *optional*, defaults to `"source"`): Name of the source in errors.
        leave_out (`Collection[str]`, *optional*): Paths of files that are already held out.

    Returns:
        `dict[str, list[SourceFile]]`: Files by the name of their split.

    Raises:
        ValueError: If a named file is not text, or a folder or glob mixes text files and files of rows.
        OSError: If a path or glob matches no file.
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
            "Holding out %s of `%s` found in `validation_source` too.", count(num_held_out, "file"), argument
        )
    if not any(chosen.values()):
        raise ValueError(f"All files of `{argument}` are also in `validation_source`: give other text.")
    return {split: files for split, files in chosen.items() if files}


def _show(item: PathLike) -> str:
    return repr(os.fspath(item))


def _find_item(item: PathLike, label: str) -> dict[str, list[SourceFile]]:
    path = Path(item).expanduser()
    if path.is_file():
        file = _describe(path.name, path)
        if file.kind is None and not is_text(file.path):
            raise ValueError(f"{label} is not text: convert it to text, or remove it.")
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
    names: list[Path] = []
    seen: set[str] = set()  # a link may lead back to a folder above it
    for root, folders, files in os.walk(folder, followlinks=True):
        if (place := os.path.realpath(root)) in seen:
            folders.clear()
            continue
        seen.add(place)
        folders.sort(key=lambda name, root=root: (os.path.islink(os.path.join(root, name)), name))
        names += [Path(root, file).relative_to(folder) for file in files]
    shown = (name for name in sorted(names) if not _is_hidden(name))
    return [(name.as_posix(), folder / name) for name in shown if (folder / name).is_file()]


def _list_glob(path: Path) -> list[tuple[str, Path]]:
    root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    return [(match.relative_to(root).as_posix(), match) for match in matches if match.is_file()]


def _is_hidden(name: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in name.parts)


def _choose_files(item: PathLike, files: list[SourceFile], label: str) -> list[SourceFile]:
    """Choose the text files or the files of rows of a folder or a glob."""
    rows = [file for file in files if file.kind and Path(file.name).name not in _OF_ROWS]
    texts = [file for file in files if not file.kind and not (rows and _ABOUT_ROWS.fullmatch(Path(file.name).name))]
    others = [file for file in texts if not is_text(file.path)]
    texts = [file for file in texts if file not in set(others)]
    if others:
        logger.warning("Skipping %s without text in %s: %s.", count(len(others), "file"), label, _list_files(others))
    if rows and texts:
        raise ValueError(
            f"{label} mixes {count(len(texts), 'text file')} ({_list_files(texts)}) with {count(len(rows), 'file')} "
            f"of rows ({_list_files(rows)}): select one kind by a glob, such as {_suggest_glob(item, texts[0])!r} or "
            f"{_suggest_glob(item, rows[0])!r}."
        )
    if not rows and not texts:
        raise ValueError(f"{label} has no text: give text files or files of rows.")
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
        words = re.split(r"[-._ 0-9/]+", file.name.lower())  # as `datasets` splits them
        splits.setdefault(next((_SPLITS[word] for word in words if word in _SPLITS), None), []).append(file)
    rest = splits.pop(None, [])
    if not files[0].kind and (rest or "train" not in splits):
        return {"train": files}
    if rest and "train" in splits:
        logger.warning(
            "The file names of %s give a training split. Skipping %s without a split in the name: %s.",
            label,
            count(len(rest), "file"),
            _list_files(rest),
        )
    elif rest:
        splits["train"] = rest
    return {str(name): splits[name] for name in splits}
