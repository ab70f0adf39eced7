"""Loads text as splits of documents, and as groups of rows for a model."""

from collections.abc import Collection, Iterator
from itertools import islice
from typing import Any

from datasets import Dataset, DatasetDict, IterableDatasetDict
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mot_hf.data.blocks import RowCollator, make_blocks, spread_rows
from mot_hf.data.default_corpus import default_corpus_files
from mot_hf.data.documents import Documents, open_source, split_documents
from mot_hf.data.progress import hide_bars
from mot_hf.data.sources import PathLike


def load_corpus(
    source: PathLike | list[PathLike] | Dataset | DatasetDict | None = None,
    *,
    validation_source: PathLike | list[PathLike] | Dataset | DatasetDict | None = None,
    validation_fraction: float = 0.05,
    text_column: str = "text",
    config_name: str | None = None,
    cache_dir: str | None = None,
    streaming: bool = False,
) -> DatasetDict | IterableDatasetDict:
    """Loads a text corpus as a data set of documents.

    A text file is one document. Its byte-order mark is removed, bytes that are not UTF-8 are replaced, and line ends
    become newlines. Each row of a `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet` file is one document. All files may
    be compressed (`.gz`, `.bz2`, `.xz`, `.zst`). Null and empty texts are skipped, and so are files in a folder that
    are not text.

    A data set keeps its own validation split (`"validation"`, else `"test"`). So does a folder of files of rows whose
    names say the split, such as `train.jsonl` and `test.jsonl`. Everything else is split by a stable hash of a text
    file's relative path or of a row's text, so the split is the same on every machine. At least one of several
    documents is held out. If there is only one document, its end is held out, from the start of a line.

    Args:
        source (*optional*):
            `None` for the default corpus; a file, a folder of text files or of files of rows (hidden files are
            skipped), a glob, or a list of these; the URL of a file of rows; a `Dataset` or `DatasetDict`; or the name
            of a data set for `load_dataset`.
        validation_source (*optional*):
            Text to hold out instead of part of `source`, given in the same way. Files in both are held out.
        validation_fraction (`float`, *optional*, defaults to 0.05):
            Share of the documents to hold out if there is neither `validation_source` nor a validation split.
        text_column (`str`, *optional*, defaults to `"text"`):
            Column of the text in rows.
        config_name (`str`, *optional*):
            Configuration of a data set loaded by name.
        cache_dir (`str`, *optional*):
            Cache folder of `datasets`; by default its own.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read documents as they are needed, instead of all of them first.

    Returns:
        `DatasetDict`, or `IterableDatasetDict` if streaming: Splits `"train"` and `"validation"` with the column
        `"text"` only.

    Raises:
        ValueError: If `validation_fraction` is not between 0 and 1, the text column is missing or is not text, a file
            is damaged or not text, text files and files of rows are mixed, or a split has no text.
        OSError: If a source is not an existing file, folder, glob with matches or data set.
    """
    splits = _load_splits(
        source,
        ("train", "validation"),
        validation_source=validation_source,
        validation_fraction=validation_fraction,
        text_column=text_column,
        config_name=config_name,
        cache_dir=cache_dir,
        streaming=streaming,
    )
    if all(isinstance(documents, Dataset) for documents in splits.values()):
        return DatasetDict(splits)
    return IterableDatasetDict(
        {name: rows.to_iterable_dataset() if isinstance(rows, Dataset) else rows for name, rows in splits.items()}
    )


@hide_bars()
def _load_splits(
    source: Any,
    names: Collection[str],
    *,
    validation_source: Any = None,
    validation_fraction: float = 0.05,
    text_column: str = "text",
    config_name: str | None = None,
    **options: Any,
) -> dict[str, Documents]:
    """Load the splits in `names`; raises a `ValueError` if one of them has no text."""
    if not 0 < validation_fraction < 1:
        raise ValueError(f"`validation_fraction={validation_fraction}` must be between 0 and 1: 0.05 is usual.")
    held_out = None
    if validation_source is not None:
        held_out = open_source(validation_source, text_column, argument="validation_source", **options)
    leave_out = held_out.paths if held_out else ()
    files = default_corpus_files() if source is None else source
    opened = open_source(files, text_column, config_name=config_name, leave_out=leave_out, **options)
    if held_out is not None:
        sources = {"train": (opened, ["train"]), "validation": (held_out, ["validation", "test", "train"])}
        splits = {name: sources[name][0].read_texts(*sources[name][1]) for name in names}
    else:
        splits = split_documents(opened, validation_fraction, names)
    for name, documents in splits.items():
        if next(iter(documents), None) is None:
            advice = ", or name text to hold out as `validation_source`" if name == "validation" else ""
            raise ValueError(f"The {name} split of `source` has no text: give more text{advice}.")
    return splits


def load_groups(
    tokenizer: PreTrainedTokenizerFast,
    source: str | None,
    split: str,
    *,
    group_size: int,
    block_length: int,
    num_groups: int,
    masked: bool = False,
    drop_last: bool = True,
    **options: Any,
) -> Iterator[dict[str, Tensor]]:
    """Reads full groups of rows of a text as inputs of a model. Reading starts with the first group requested.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): The tokenizer.
        source (`str`, *optional*): See [`load_corpus`].
        split (`str`): `"train"` or `"validation"`.
        group_size (`int`): Number of rows G in a group.
        block_length (`int`): Number of tokens T in a row.
        num_groups (`int`): Maximum number of groups to read.
        masked (`bool`, *optional*, defaults to `False`): Whether to mask 15 % of the tokens and label only those.
        drop_last (`bool`, *optional*, defaults to `True`): Whether to leave out rows that do not fill a group.
        options: Further arguments of [`load_corpus`].

    Yields:
        `dict[str, torch.Tensor]`: `input_ids` and `labels` `[G, T]`.

    Raises:
        ValueError: As in [`load_corpus`] and [`make_blocks`].
    """
    documents = _load_splits(source, [split], **options)
    corpus = DatasetDict(documents) if isinstance(documents[split], Dataset) else IterableDatasetDict(documents)
    rows = make_blocks(corpus, tokenizer, block_length=block_length, group_size=group_size)[split]
    if not isinstance(rows, Dataset):
        rows = Dataset.from_list(list(rows.take(num_groups * group_size)))
        rows = rows.select(spread_rows(len(rows), group_size, seed=0))
    yield from make_batches(rows, tokenizer, group_size, num_groups, masked=masked, drop_last=drop_last)


def make_batches(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    num_batches: int,
    *,
    masked: bool = False,
    drop_last: bool = True,
    seed: int = 0,
) -> Iterator[dict[str, Tensor]]:
    """Makes batches of the first rows.

    Args:
        rows (`Dataset`): Rows of equal length, as in a split of [`make_blocks`].
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer of the model.
        batch_size (`int`): Rows B of a batch.
        num_batches (`int`): Batches, at most.
        masked (`bool`, *optional*, defaults to `False`): Whether to mask 15 % of the tokens and predict those.
        drop_last (`bool`, *optional*, defaults to `True`): Whether to leave out rows that do not fill a batch.
        seed (`int`, *optional*, defaults to 0): Seed of the masks.

    Yields:
        `dict[str, torch.Tensor]`: `input_ids` and `labels` `[B, T]`.
    """
    collator = RowCollator(tokenizer, mlm=masked, seed=seed)
    loader = DataLoader(rows, batch_size=batch_size, collate_fn=collator, drop_last=drop_last)
    yield from islice(loader, num_batches)
