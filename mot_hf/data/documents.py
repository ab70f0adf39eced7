"""Reads the documents of any source, and splits them for training and validation."""

import itertools
import logging
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value

from mot_hf.data.rows import check_columns, read_rows, read_text
from mot_hf.data.sources import (
    DataSet,
    FileSource,
    SourceFile,
    count,
    explain_errors,
    find_files,
    find_place,
    is_data_set,
    load_data_set,
)
from mot_hf.version import __version__

logger = logging.getLogger(__name__)

Documents = Dataset | IterableDataset

# `place` is a hash of the document between 0 and 1, or NaN without text. It decides what is held out.
_FEATURES = Features({"text": Value("string"), "place": Value("float64"), "num_replaced": Value("int64")})
_TEXT_TYPES = ("string", "large_string", "string_view", "null")
_MAX_BATCH_BYTES = 2**27
_MIN_SEARCHED = 2000  # minimum number of characters to search for the end of a line


class OpenSource(NamedTuple):
    """A source before it is read.

    Args:
        splits (`dict[str, Callable[[], Documents]]`): A function to read each split, by the name of the split.
        paths (`list[str]`): Its files; empty for a data set.
        label (`str`): Its name in warnings; empty for no warnings.
    """

    splits: dict[str, Callable[[], Documents]]
    paths: list[str]
    label: str

    def read(self, *names: str) -> Documents:
        """Reads the first of these splits that exists."""
        for name in names:
            if name in self.splits:
                return self.splits[name]()
        raise ValueError(
            f"`source` has the splits {list(self.splits)} but needs one called {names[-1]!r}: rename one of them."
        )

    def read_texts(self, *names: str) -> Documents:
        """Reads the first of these splits that exists, without empty texts and with the column `"text"` only."""
        documents = self.read(*names)
        if isinstance(documents, Dataset):
            return _take(documents, ~np.isnan(_find_places(documents, self.label)))
        return _take_stream(documents, 0, math.inf)


def open_source(
    source: FileSource | DataSet,
    text_column: str,
    *,
    config_name: str | None = None,
    cache_dir: str | None = None,
    streaming: bool = False,
    argument: str = "source",
    leave_out: Collection[str] = (),
) -> OpenSource:
    """Finds the splits of a source. Reading one gives the columns `"text"` and `"place"`.

    Args:
        source (`FileSource` or `DataSet`): Files, or a data set or its name.
        text_column (`str`): Column of the text in rows.
        config_name (`str`, *optional*): Configuration of a data set loaded by name.
        cache_dir (`str`, *optional*): Cache folder of `datasets`.
        streaming (`bool`, *optional*, defaults to `False`): Whether to read text as it is needed.
        argument (`str`, *optional*, defaults to `"source"`): Name of the source in errors.
        leave_out (`Collection[str]`, *optional*): Files to skip.

    Returns:
        [`OpenSource`]: The splits.

    Raises:
        ValueError: If the source is not text, or mixes text files and files of rows.
        OSError: If the source does not exist.
    """
    label = f"`{argument}`"
    if is_data_set(source, config_name):
        loaded = load_data_set(source, config_name, cache_dir, streaming, argument)
        splits = {"train": loaded} if isinstance(loaded, Dataset | IterableDataset) else loaded
        return OpenSource(
            {str(name): partial(_place_rows, rows, text_column) for name, rows in splits.items()}, [], label
        )
    label = "" if isinstance(source, Mapping) else label
    files = find_files(source, argument, leave_out)
    paths = [file.path for split in files.values() for file in split]
    read = partial(_read_files, text_column=text_column, cache_dir=cache_dir, streaming=streaming, label=label)
    return OpenSource({name: partial(read, split) for name, split in files.items()}, paths, label)


def _place_rows(rows: Documents, text_column: str) -> Documents:
    # The columns of a stream are unknown until its first row is read.
    columns = rows.column_names or list(next(iter(rows), {text_column: None}))
    check_columns({"text_column": text_column}, columns)
    feature = (rows.features or {}).get(text_column)
    if feature is not None and getattr(feature, "dtype", None) not in _TEXT_TYPES:
        raise ValueError(
            f"`text_column={text_column!r}` has values of type {feature!r}, not text: name a column of strings."
        )
    documents = rows.select_columns([text_column])
    documents = documents if text_column == "text" else documents.rename_column(text_column, "text")
    return documents if isinstance(documents, Dataset) else documents.map(_place_row, input_columns=["text"])


def _place_row(text: object) -> dict[str, float]:
    text = check_text(text, "`text_column`")
    if not text:
        _warn_once("Skipping rows of the stream without text: null or empty.")
    return {"place": find_place(text.encode()) if text else math.nan}


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def check_text(text: object, where: str) -> str:
    """Returns a text, empty for `None`; raises a `ValueError` that names its place if it is anything else."""
    if text is None or isinstance(text, str):
        return text or ""
    raise ValueError(f"{where} has {str(text)[:40]!r} ({type(text).__name__}), not text: give text, in quotes.")


def _read_files(
    files: list[SourceFile], text_column: str, cache_dir: str | None, streaming: bool, label: str
) -> Documents:
    # The cache depends on the arguments, so they include the size and time of each file and the version of the reader.
    arguments = {"files": [tuple(file) for file in files], "text_column": text_column, "version": __version__}
    if streaming:
        return IterableDataset.from_generator(
            _generate, _FEATURES, gen_kwargs={**arguments, "has_warnings": bool(label)}
        )
    largest = max((file.size for file in files if file.kind is None), default=0)
    with explain_errors(label):
        return Dataset.from_generator(
            _generate,
            _FEATURES,
            cache_dir,
            gen_kwargs=arguments,
            writer_batch_size=max(1, min(1000, _MAX_BATCH_BYTES // max(largest, 1))),
        )


def _generate(
    files: list[tuple[Any, ...]], text_column: str, version: str, *, has_warnings: bool = False
) -> Iterator[dict[str, Any]]:
    for file in itertools.starmap(SourceFile, files):
        num_texts = num_empty = num_bytes = 0
        for text, key, num_replaced in _read_file(file, text_column):
            num_texts += 1
            num_empty += not text
            num_bytes += num_replaced
            yield {"text": text, "place": find_place(key) if text else math.nan, "num_replaced": num_replaced}
        if not num_texts:  # `datasets` cannot make a data set without rows
            yield {"text": "", "place": math.nan, "num_replaced": 0}
        if has_warnings:  # without streaming, the losses of all files are counted together later
            for message in describe_losses(repr(file.path), num_empty, num_bytes):
                _warn_once(message)


def _read_file(file: SourceFile, text_column: str) -> Iterator[tuple[str, bytes, int]]:
    """Read texts, each with the key for its place and the number of replaced bytes."""
    if file.kind is None:
        text, num_replaced = read_text(file.path)
        yield text, os.fsencode(file.name), num_replaced
        return
    for row in read_rows(file.path, file.kind, {"text_column": text_column}):
        text = check_text(row.values[text_column], f"`text_column={text_column!r}` in {file.path!r}, {row.place},")
        yield text, text.encode(), row.num_replaced


def describe_losses(place: str, num_empty: int, num_bytes: int) -> list[str]:
    """Describes what is skipped or replaced in a place."""
    losses = []
    if num_empty:
        losses.append(f"Skipping {count(num_empty, 'text')} of {place}: null or empty.")
    if num_bytes:
        losses.append(f"Replacing {count(num_bytes, 'byte')} of {place} by \ufffd: not UTF-8. Convert to UTF-8.")
    return losses


def split_documents(source: OpenSource, validation_fraction: float, names: Collection[str]) -> dict[str, Documents]:
    """Splits a source into `"train"` and `"validation"`, with the column `"text"` only.

    A source's own split `"validation"`, else `"test"`, is kept. Otherwise, the documents whose place is below the
    fraction are held out: at least one, and not all of them. If there is only one document, its end is held out.

    Args:
        source ([`OpenSource`]): The source.
        validation_fraction (`float`): Share of the documents to hold out.
        names (`Collection[str]`): Which of the two splits are needed. If the source has both, only these are read.

    Returns:
        `dict[str, Documents]`: The splits in `names`. They may be empty.

    Raises:
        ValueError: If the source has no training split, or cannot be read.
    """
    held_out = next((name for name in ("validation", "test") if name in source.splits), None)
    if held_out is not None:
        own = {"train": "train", "validation": held_out}
        return {name: source.read_texts(own[name]) for name in names}
    documents = source.read("train")
    if isinstance(documents, Dataset):
        return _split_data_set(documents, validation_fraction, names, source.label)
    return _split_stream(documents, validation_fraction, names)


def _find_places(documents: Dataset, label: str) -> np.ndarray:
    """Return the places of all documents, and warn of what is skipped or replaced."""
    num_bytes = sum(documents["num_replaced"][:]) if "num_replaced" in documents.column_names else 0
    if "place" not in documents.column_names and len(documents):
        documents = documents.map(_place_text, input_columns=["text"], remove_columns=["text"])
    places = np.asarray(documents["place"][:] if len(documents) else [], dtype=float)
    for message in describe_losses(label, int(np.isnan(places).sum()), num_bytes) if label else ():
        logger.warning(message)
    return places


def _place_text(text: str | None) -> dict[str, float]:
    return {"place": find_place(text.encode()) if text else math.nan}


def _take(documents: Dataset, mask: np.ndarray) -> Dataset:
    return (documents if mask.all() else documents.select(np.flatnonzero(mask))).select_columns(["text"])


def _split_data_set(documents: Dataset, fraction: float, names: Collection[str], label: str) -> dict[str, Documents]:
    places = _find_places(documents, label)
    threshold = find_threshold(places.tolist(), fraction)
    if threshold is not None:
        masks = {"train": places >= threshold, "validation": places < threshold}
        return {name: _take(documents, masks[name]) for name in names}
    filled = np.flatnonzero(~np.isnan(places))
    if len(filled) > 1 and label:
        logger.warning("All %d texts of %s are the same: one is kept, and its end held out.", len(filled), label)
    one = _take(documents.select(filled[:1]), np.array([True]))
    return _cut_document(one, fraction, names)


def _split_stream(documents: IterableDataset, fraction: float, names: Collection[str]) -> dict[str, Documents]:
    threshold = find_threshold((row["place"] for row in documents), fraction)
    if threshold is None:
        return _cut_document(_take_stream(documents, 0, math.inf).take(1), fraction, names)
    bounds = {"train": (threshold, math.inf), "validation": (0, threshold)}
    return {name: _take_stream(documents, *bounds[name]) for name in names}


def _take_stream(documents: IterableDataset, low: float, high: float) -> IterableDataset:
    is_inside = partial(_is_between, low=low, high=high)
    return documents.filter(is_inside, input_columns=["place"]).select_columns(["text"])


def _is_between(place: float, low: float, high: float) -> bool:
    return low <= place < high


def find_threshold(places: Iterable[float], fraction: float) -> float | None:
    """Finds the place below which documents are held out: the fraction, unless all places are on one side of it.

    Returns `None` if there are fewer than two documents. A stream may be endless, so no more is read than needed.
    """
    low, high = math.inf, -math.inf
    for place in places:
        if not math.isnan(place):
            low, high = min(low, place), max(high, place)
            if low < fraction <= high:
                return fraction
    if low >= high:
        return None
    return min(max(fraction, math.nextafter(low, 1)), high)


def _cut_document(document: Documents, fraction: float, names: Collection[str]) -> dict[str, Documents]:
    return {
        name: document.map(cut_text, input_columns=["text"], fn_kwargs={"split": name, "fraction": fraction}).filter(
            bool, input_columns=["text"]
        )
        for name in names
    }


def cut_text(text: str, split: str, fraction: float) -> dict[str, str]:
    """Cuts a text in two, and takes the part of one split.

    Args:
        text (`str`): The text.
        split (`str`): `"train"` for its beginning, `"validation"` for its end.
        fraction (`float`): Share of the text in its end part. This part starts with a line if one starts nearby,
            else with a word.

    Returns:
        `dict[str, str]`: The part as `"text"`.
    """
    start, end = len(text) - len(text.lstrip()), len(text.rstrip())
    target = max(start + 1, end - max(1, round((end - start) * fraction)))
    earliest = max(start + 1, end - max(2 * (end - target), _MIN_SEARCHED))
    cut = text.rfind("\n", earliest - 1, target) + 1 or text.rfind(" ", earliest - 1, target) + 1 or target
    return {"text": text[:cut] if split == "train" else text[cut:]}
