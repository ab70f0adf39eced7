"""Where text comes from: files, folders, globs, and data sets of any kind, read at once or as they are needed."""

import glob
import hashlib
import itertools
import os
import platform
from collections import defaultdict
from pathlib import Path
from typing import TypeVar

from aiohttp import ClientError
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from huggingface_hub.errors import HFValidationError

PathLike = str | os.PathLike[str]
Split = TypeVar("Split", Dataset, IterableDataset)

# Builder of `datasets` by the suffix of a file that holds rows instead of one text.
_BUILDERS = {".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_URL_SCHEMES = ("http://", "https://", "hf://")


def is_data_set(source: object) -> bool:
    """Tells whether a source is a data set, files of rows or the name of one, and not text files."""
    if isinstance(source, Dataset | DatasetDict):
        return True
    if not isinstance(source, str | os.PathLike):
        return False
    name = os.fspath(source)
    if Path(name).suffix in _BUILDERS or name.startswith(_URL_SCHEMES):
        return True
    return isinstance(source, str) and not glob.has_magic(name) and not Path(name).expanduser().exists()


def name_source(source: str | None) -> str:
    """Names a source of text in words that others may read: a file or folder without the path to it.

    Args:
        source (`str`, *optional*): File, folder, glob, address or data set; `None` for Python's standard library.

    Returns:
        `str`: The name.
    """
    if source is None:
        return f"the standard library of Python {platform.python_version()}"
    path = Path(source)
    is_local = glob.has_magic(source) or path.suffix in _BUILDERS or path.expanduser().exists()
    return path.name if is_local and not source.startswith(_URL_SCHEMES) else source


def load_rows(
    source: PathLike | Dataset | DatasetDict, config_name: str | None, cache_dir: str | None, streaming: bool
) -> Dataset | DatasetDict | IterableDatasetDict:
    """Loads a data set from files of rows, from a URL or by its name.

    Raises:
        OSError: There is no such data set, or it cannot be read.
    """
    if isinstance(source, Dataset | DatasetDict):
        return source
    name = os.fspath(source)
    builder = _BUILDERS.get(Path(name).suffix)
    try:
        if builder is None:
            return load_dataset(name, config_name, cache_dir=cache_dir, streaming=streaming)
        return load_dataset(builder, data_files={"train": name}, cache_dir=cache_dir, streaming=streaming)
    except ClientError as error:
        raise OSError(
            f"Downloading `source={name!r}` was interrupted: check the network and start again ({error})."
        ) from error
    except (OSError, HFValidationError) as error:
        raise OSError(
            f"`source={name!r}` is neither an existing file or folder nor a data set that `load_dataset` finds: "
            f"check the path, or the name and the network ({error})."
        ) from error


def list_files(source: PathLike | list[PathLike]) -> list[tuple[str, Path]]:
    """Pairs each text file of a path, glob or list with its path relative to the folder it was found in."""
    if isinstance(source, list):
        return [pair for item in source for pair in list_files(item)]
    path = Path(source).expanduser()
    if path.is_file():
        return [(path.name, path)]
    if path.is_dir():
        names = sorted(match.relative_to(path) for match in path.rglob("*") if match.is_file())
        return [(name.as_posix(), path / name) for name in names if not _is_hidden(name)]
    root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    return [(match.relative_to(root).as_posix(), match) for match in matches if match.is_file()]


def _is_hidden(name: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in name.parts)


def load_files(
    files: list[tuple[str, Path]], validation_fraction: float, cache_dir: str | None, streaming: bool
) -> DatasetDict | IterableDatasetDict:
    """Loads text files as one document each, split by a hash of their names.

    Raises:
        ValueError: A file is not text.
    """
    splits = defaultdict(list)
    for name, path in files:
        _check_is_text(path)
        split = "validation" if is_held_out(os.fsencode(name), validation_fraction) else "train"
        splits[split].append(glob.escape(str(path.absolute())))
    return load_dataset(
        "text",
        data_files=dict(splits),
        sample_by="document",
        encoding_errors="replace",
        cache_dir=cache_dir,
        streaming=streaming,
    )


def _check_is_text(path: Path) -> None:
    with path.open("rb") as file:
        if b"\0" in file.read(8192):
            raise ValueError(
                f"`source` holds {str(path)!r}, which is not UTF-8 text: leave it out, or load it with `datasets` "
                "and pass the `Dataset`."
            )


def is_held_out(key: bytes, validation_fraction: float) -> bool:
    """Tells by a stable hash of a name or a text whether it belongs to the validation split."""
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") / 2**64 < validation_fraction


def split_documents(
    source: Dataset | DatasetDict | IterableDatasetDict, text_column: str, validation_fraction: float
) -> DatasetDict | IterableDatasetDict:
    """Splits a data set into `"train"` and `"validation"` with the one column `"text"`.

    Raises:
        ValueError: The training split or the text column is missing.
    """
    splits = {"train": source} if isinstance(source, Dataset) else source
    if "train" not in splits:
        raise ValueError(f"`source` has the splits {list(splits)} and needs one called 'train': rename one of them.")
    kind = IterableDatasetDict if isinstance(source, IterableDatasetDict) else DatasetDict
    train = _select_text(splits["train"], text_column)
    for name in ("validation", "test"):
        if name in splits:
            return kind({"train": train, "validation": _select_text(splits[name], text_column)})
    return kind({name: _select_side(train, name, validation_fraction) for name in ("train", "validation")})


def _select_side(documents: Split, name: str, validation_fraction: float) -> Split:
    def is_on_side(text: str | None) -> bool:
        return is_held_out((text or "").encode(), validation_fraction) is (name == "validation")

    return documents.filter(is_on_side, input_columns=["text"])


def _select_text(documents: Split, text_column: str) -> Split:
    # A stream knows its columns only once its first row was read.
    columns = documents.column_names or list(next(iter(documents), {text_column: None}))
    if text_column not in columns:
        raise ValueError(f"`text_column={text_column!r}` is no column of the data set: use {columns}.")
    selected = documents.select_columns([text_column])
    return selected if text_column == "text" else selected.rename_column(text_column, "text")
