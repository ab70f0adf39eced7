"""Text to tokenizer and aligned blocks: what a Mixture of Tokens model is trained on.

The default corpus is the Python standard library of the running interpreter, so every machine has real text without a
download. Figures on it are comparable only within one Python version: [`default_corpus_info`] says which one was read.
"""

import hashlib
import platform
import re
import sysconfig
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, IterableDatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from mot_hf.documents import Documents, open_source, split_documents
from mot_hf.sources import PathLike

PAD_TOKEN = "<|pad|>"
END_TOKEN = "<|end|>"
MASK_TOKEN = "<|mask|>"
SPECIAL_TOKENS = [PAD_TOKEN, END_TOKEN, MASK_TOKEN]

# pydoc_data is one large file of generated documentation, most of the split that it falls into
EXCLUDED_FOLDER = re.compile(
    r"tests?|idle_test|idlelib|lib2to3|encodings|pydoc_data|site-packages|dist-packages|__pycache__|config-.*"
)


@dataclass(frozen=True)
class CorpusInfo:
    """Which files a figure was measured on.

    Args:
        source (`str`): Folder the files lie in.
        python_version (`str`): Version of the interpreter whose standard library was read.
        num_files (`int`): Number of files.
        num_bytes (`int`): Size of all files together.
        digest (`str`): SHA-256 over the relative paths and the contents of the files.
    """

    source: str
    python_version: str
    num_files: int
    num_bytes: int
    digest: str


def default_corpus_files() -> dict[str, Path]:
    """Lists the files of the default corpus, the standard library without tests and packages.

    Returns:
        `dict[str, Path]`: Path of each file by its posix path relative to the standard library, sorted.
    """
    root = _stdlib_folder()
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    return {name: paths[name] for name in sorted(paths) if _is_corpus_file(name) and paths[name].is_file()}


def default_corpus_info() -> CorpusInfo:
    """Describes the default corpus on this machine.

    Returns:
        [`CorpusInfo`]: Python version, size and digest of the files.
    """
    digest, num_bytes = hashlib.sha256(), 0
    files = default_corpus_files()
    for name, path in files.items():
        content = path.read_bytes()
        num_bytes += len(content)
        digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    return CorpusInfo(str(_stdlib_folder()), platform.python_version(), len(files), num_bytes, digest.hexdigest())


def _stdlib_folder() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _is_corpus_file(name: str) -> bool:
    *folders, file_name = name.split("/")
    # _sysconfigdata_* holds paths and flags of the machine Python was built on
    return not file_name.startswith("_sysconfigdata_") and not any(map(EXCLUDED_FOLDER.fullmatch, folders))


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

    A text file is one document; a byte-order mark is removed, bytes that are not UTF-8 are replaced and line ends
    become newlines. Each row of a `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet` file is one document; all files may
    be compressed (`.gz`, `.bz2`, `.xz`, `.zst`). What is null or empty is left out, and so are files in a folder that
    are no text.

    A data set keeps its own validation split (`"validation"`, else `"test"`), and so does a folder of files of rows
    whose names say their split, such as `train.jsonl` and `test.jsonl`. Everything else is split by a stable hash, of
    a text file's relative path or of a row's text, so the split is the same on every machine. Of two documents and
    more at least one is held out; of a single document the end is, from the beginning of a line.

    Args:
        source (*optional*):
            `None` for the default corpus; the path of a file, a folder of text files or of files of rows (hidden ones
            are left out), a glob, or a list of these; the URL of a file of rows; a `Dataset` or `DatasetDict`; or else
            a data set's name for `load_dataset`.
        validation_source (*optional*):
            Text of the same kinds that is held out, in place of a part of `source`. Files of both are held out.
        validation_fraction (`float`, *optional*, defaults to 0.05):
            Share of the documents held out where there is neither `validation_source` nor a validation split.
        text_column (`str`, *optional*, defaults to `"text"`):
            Column of rows that holds the text.
        config_name (`str`, *optional*):
            Configuration of a data set loaded by name.
        cache_dir (`str`, *optional*):
            Cache of `datasets`; its own default when not set.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read documents as they are needed, instead of all before.

    Returns:
        `DatasetDict`, or `IterableDatasetDict` if streaming: Splits `"train"` and `"validation"` with the one column
        `"text"`.

    Raises:
        ValueError: If `validation_fraction` is not between 0 and 1, the text column is missing or holds no text, a
            file is damaged or no text, texts and rows are mixed, or a split holds no text.
        OSError: If a source names no existing file, match or data set.
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
    """Load the splits that are needed; raises a `ValueError` where one of them holds no text."""
    if not 0 < validation_fraction < 1:
        raise ValueError(f"`validation_fraction={validation_fraction}` must lie between 0 and 1: 0.05 is usual.")
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
            raise ValueError(f"The {name} split of `source` holds no text: give more text{advice}.")
    return splits


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer, which encodes every text and decodes it back unchanged.

    Args:
        texts (`Iterable[str]`): Documents to train on.
        vocab_size (`int`, *optional*, defaults to 4096):
            Number of tokens with the 256 bytes and the special tokens `<|pad|>`, `<|end|>` (`eos_token`) and
            `<|mask|>`. A text too short for as many merges gives fewer.

    Returns:
        [`PreTrainedTokenizerFast`]: The tokenizer. The same texts always give the same one.

    Raises:
        ValueError: If `vocab_size` has no room for the bytes and the special tokens.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(
            f"`vocab_size={vocab_size}` has no room for the bytes and special tokens: use {smallest} or more."
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        mask_token=MASK_TOKEN,
        clean_up_tokenization_spaces=False,
    )


def token_byte_counts(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Counts the UTF-8 bytes of text behind every token, which turns a loss per token into bits per byte.

    The counts over a text's tokens add up to its length, as [`make_blocks`] encodes it.

    Args:
        tokenizer ([`PreTrainedTokenizerFast`]): A byte-level BPE tokenizer.

    Returns:
        `torch.Tensor` of shape `(vocab_size,)`: Number of bytes by token id, 0 for special tokens.

    Raises:
        ValueError: If the tokenizer is not byte-level.
    """
    if "ByteLevel" not in str(tokenizer.backend_tokenizer.decoder):
        raise ValueError(f"`tokenizer` must be byte-level BPE, its decoder is {tokenizer.backend_tokenizer.decoder}.")
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    added = tokenizer.added_tokens_decoder
    vocab = tokenizer.get_vocab()
    counts = torch.zeros(max(vocab.values()) + 1, dtype=torch.int64)
    for token, index in vocab.items():
        if index in added:
            counts[index] = 0 if added[index].special else len(token.encode())
        elif alphabet.issuperset(token):
            # one character of the byte alphabet stands for one byte
            counts[index] = len(token)
        else:
            raise ValueError(f"`tokenizer` must be byte-level BPE, its token {token!r} is not made of bytes.")
    return counts


def make_blocks(
    corpus: DatasetDict | IterableDatasetDict,
    tokenizer: PreTrainedTokenizerFast,
    *,
    block_length: int = 128,
    group_size: int = 32,
    seed: int = 0,
    buffer_size: int = 10_000,
) -> DatasetDict | IterableDatasetDict:
    """Tokenizes a corpus into rows of equal length, ordered by [`spread_rows`] for mixing.

    The documents, each followed by the end token, are joined in batches of 1000 and cut into blocks; what is left at
    the end of a batch is dropped. Special tokens spelled out in a text are encoded as text. `datasets` caches the
    result beside the corpus.

    Rows of a corpus that is streamed cannot be spread over the whole of it: those of the training split are shuffled
    through a buffer instead, and those of the validation split keep their order.

    Args:
        corpus (`DatasetDict` or `IterableDatasetDict`): Splits with a column `"text"`, as [`load_corpus`] gives them.
        tokenizer ([`PreTrainedTokenizerFast`]): Tokenizer with an `eos_token`.
        block_length (`int`, *optional*, defaults to 128): Number of tokens in a row.
        group_size (`int`, *optional*, defaults to 32): Number of rows that are mixed.
        seed (`int`, *optional*, defaults to 0): Seed of the order of the rows.
        buffer_size (`int`, *optional*, defaults to 10000): Rows in the buffer of a corpus that is streamed.

    Returns:
        `DatasetDict` or `IterableDatasetDict`: The same splits with the one column `"input_ids"`.

    Raises:
        ValueError: If `block_length` is not positive, the tokenizer has no end token or a split is shorter than a
            block.
    """
    if block_length < 1:
        raise ValueError(f"`block_length={block_length}` must be at least 1.")
    if tokenizer.eos_token_id is None:
        raise ValueError("`tokenizer` has no end token: set `tokenizer.eos_token`.")
    cutting = {
        "batched": True,
        "batch_size": 1000,
        "input_columns": ["text"],
        "remove_columns": ["text"],
        "fn_kwargs": {"tokenizer": tokenizer, "block_length": block_length},
    }
    if isinstance(corpus, IterableDatasetDict):
        blocks = corpus.map(_cut_blocks, **cutting)
        blocks["train"] = blocks["train"].shuffle(seed=seed, buffer_size=buffer_size)
        return blocks
    blocks = corpus.map(_cut_blocks, **cutting, desc="Cutting blocks")
    for name, split in blocks.items():
        if split.num_rows == 0:
            more = "" if name == "train" else ", hold out more (`validation_fraction`)"
            raise ValueError(
                f"The {name} split is shorter than `block_length={block_length}`: choose a shorter one{more}, or give "
                "more text."
            )
    return DatasetDict(
        {name: split.select(spread_rows(split.num_rows, group_size, seed)) for name, split in blocks.items()}
    )


def load_groups(
    tokenizer: PreTrainedTokenizerFast,
    source: str | None,
    split: str,
    *,
    group_size: int,
    block_length: int,
    num_groups: int,
    masked: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """Reads full groups of rows of a text, as a model takes them; nothing is read before the first is asked for.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): The tokenizer.
        source (`str`, *optional*): As in [`load_corpus`].
        split (`str`): `"train"` or `"validation"`.
        group_size (`int`): Rows G of a group.
        block_length (`int`): Tokens T of a row.
        num_groups (`int`): Groups to read at most.
        masked (`bool`, *optional*, defaults to `False`): Whether 15 % of the tokens are masked, and labels theirs.

    Yields:
        `dict[str, torch.Tensor]`: `input_ids` and `labels` `[G, T]`.

    Raises:
        ValueError: As [`load_corpus`] and [`make_blocks`].
    """
    corpus = DatasetDict(_load_splits(source, [split]))
    rows = make_blocks(corpus, tokenizer, block_length=block_length, group_size=group_size)[split]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=masked, seed=0)
    yield from islice(DataLoader(rows, batch_size=group_size, collate_fn=collator, drop_last=True), num_groups)


def _cut_blocks(texts: list[str], tokenizer: PreTrainedTokenizerFast, block_length: int) -> dict[str, Any]:
    documents = tokenizer(
        [text or "" for text in texts],
        add_special_tokens=False,
        split_special_tokens=True,  # a text that spells the end token does not end there
        verbose=False,  # a document may be longer than model_max_length, its blocks are not
    )["input_ids"]
    ids = [token for document in documents if document for token in (*document, tokenizer.eos_token_id)]
    ends = range(block_length, len(ids) + 1, block_length)
    return {"input_ids": [ids[end - block_length : end] for end in ends]}


def spread_rows(num_rows: int, group_size: int, seed: int) -> list[int]:
    """Orders the rows of a text so that every group of consecutive rows is drawn from all over it.

    The rows are cut into `group_size` strata; a group takes the row at one random place of every stratum. Rows of a
    group therefore lie about `num_rows / group_size` apart, and from `num_rows >= 2 * group_size` on no two of them
    are neighbours in the text. Rows that fill no group are spaced equally and come last.

    Args:
        num_rows (`int`): Number of rows.
        group_size (`int`): Number of rows in a group.
        seed (`int`): Seed of the order of the groups and of the rows in a group.

    Returns:
        `list[int]`: A permutation of `range(num_rows)`.

    Raises:
        ValueError: If `num_rows` is negative or `group_size` is not positive.
    """
    if num_rows < 0 or group_size < 1:
        raise ValueError(f"`num_rows={num_rows}` must be at least 0 and `group_size={group_size}` at least 1.")
    generator = np.random.default_rng(seed)
    num_groups, num_last = divmod(num_rows, group_size)
    last = np.arange(num_last) * num_rows // max(num_last, 1)
    strata = np.delete(np.arange(num_rows), last).reshape(group_size, num_groups)
    groups = generator.permutation(strata.T)  # [num_groups, group_size]
    # a stratum must not always sit at the same place of a group
    groups = generator.permuted(groups, axis=1)
    return groups.flatten().tolist() + generator.permutation(last).tolist()
