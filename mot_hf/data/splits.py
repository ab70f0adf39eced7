"""The training and the validation split of rows, from files or from data sets."""

from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict

from mot_hf.data.documents import find_threshold
from mot_hf.data.rows import ROW_KINDS, row_kind
from mot_hf.data.sources import SourceFile, find_files, find_place, is_data_set, load_data_set

# Reads files, or converts a data set; the second argument is the name of the source in errors.
FileReader = Callable[[list[SourceFile], str], Dataset]
Converter = Callable[[Dataset, str], Dataset]


def load_splits(
    source: str, validation_source: str | None, config_name: str | None, read_files: FileReader, convert: Converter
) -> dict[str, Dataset]:
    """Loads the training split, and the validation split if the sources have one.

    A split `"validation"` is preferred to one called `"test"`.

    Args:
        source (`str`): File of rows, folder or glob of such files, or name of a data set.
        validation_source (`str`, *optional*): Rows to hold out, in the same forms.
        config_name (`str`, *optional*): Configuration of a data set loaded by name.
        read_files (`Callable`): Makes rows of files.
        convert (`Callable`): Makes such rows of a data set.

    Returns:
        `dict[str, Dataset]`: Split `"train"`, and `"validation"` if there is one.

    Raises:
        ValueError: A source cannot be read, or has splits but none called `"train"`; `validation_source` has several
            splits but none called `"validation"` or `"test"`.
        OSError: A source does not exist.
    """
    held_out: dict[str, Dataset] = {}
    paths: list[str] = []
    if validation_source is not None:
        held_out, paths = _read_source(validation_source, "validation_source", None, read_files, convert)
    splits, _ = _read_source(source, "source", config_name, read_files, convert, leave_out=paths)
    if "train" not in splits:
        raise ValueError(f"`source` has the splits {list(splits)} but needs one called 'train': rename one of them.")
    of_validation = held_out or splits
    found = [of_validation[name] for name in ("validation", "test") if name in of_validation]
    if held_out and not found:
        if len(held_out) > 1:
            raise ValueError(
                f"`validation_source` has the splits {list(held_out)} but needs one called 'validation' or 'test': "
                "rename one of them."
            )
        found = list(held_out.values())
    return {"train": splits["train"], **({"validation": found[0]} if found else {})}


def _read_source(
    source: str,
    argument: str,
    config_name: str | None,
    read_files: FileReader,
    convert: Converter,
    leave_out: Collection[str] = (),
) -> tuple[dict[str, Dataset], list[str]]:
    """Read the splits of a source; also returns the paths of its files."""
    if is_data_set(source, config_name) or _has_no_rows(source):
        loaded = load_data_set(source, config_name, argument=argument)
        named: Any = {"train": loaded} if isinstance(loaded, Dataset) else loaded
        return {str(name): convert(split, argument) for name, split in named.items()}, []
    files = find_files(source, argument, leave_out)
    paths = [file.path for split in files.values() for file in split]
    return {name: read_files(split, argument) for name, split in files.items()}, paths


def _has_no_rows(source: str) -> bool:
    """Whether a folder has no file of rows: `datasets` can read more kinds of files."""
    folder = Path(source).expanduser()
    return folder.is_dir() and not any(row_kind(file.name) for file in folder.rglob("*"))


def check_is_rows(file: SourceFile, argument: str, lacking: str) -> str:
    """Returns the kind of a file of rows.

    Args:
        file ([`SourceFile`]): The file.
        argument (`str`): Name of its source in errors.
        lacking (`str`): What a text has none of.

    Returns:
        `str`: The kind.

    Raises:
        ValueError: It is a text.
    """
    if file.kind is None:
        raise ValueError(
            f"`{argument}` contains {file.path!r}, a text without {lacking}: give files of rows "
            f"({', '.join(ROW_KINDS)}) or a glob of such files."
        )
    return file.kind


def hold_out(splits: dict[str, Dataset], keys: Iterable[str], fraction: float) -> DatasetDict:
    """Holds out a share of the training split by a stable hash, at least one row, if there is no validation split.

    Args:
        splits (`dict[str, Dataset]`): Split `"train"`, and `"validation"` if there is one.
        keys (`Iterable[str]`): What decides on each training row.
        fraction (`float`): Share of the rows to hold out.

    Returns:
        `DatasetDict`: Both splits.

    Raises:
        ValueError: A split is empty.
    """
    if "validation" not in splits:
        rows, places = splits["train"], np.array([find_place(key.encode()) for key in keys])
        threshold = find_threshold(places.tolist(), fraction)
        held_out = places < (0 if threshold is None else threshold)
        splits = {
            name: rows.select(np.flatnonzero(side)) for name, side in (("train", ~held_out), ("validation", held_out))
        }
    for name, split in splits.items():
        if not len(split):
            advice = ", or name texts to hold out as `validation_source`" if name == "validation" else ""
            raise ValueError(f"The {name} split of `source` has no text: give more texts{advice}.")
    return DatasetDict(splits)
