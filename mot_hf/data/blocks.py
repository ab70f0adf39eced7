"""Rows of equal length: cut from documents, and ordered so that a group mixes different ones."""

from typing import Any

import numpy as np
from datasets import DatasetDict, IterableDatasetDict
from transformers import PreTrainedTokenizerFast


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
