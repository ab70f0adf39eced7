"""Rows of equal length: cut from documents, and ordered so that a group mixes different documents."""

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict, IterableDatasetDict
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from mot_hf.data.progress import hide_bars


class RowCollator(DataCollatorForLanguageModeling):
    """Makes batches of rows of equal length: as in the base class, but every token of a causal row is a label.

    The base class leaves out padding, and with it the ends of texts where a tokenizer pads with its end token.
    """

    def torch_call(self, examples: list[Any]) -> dict[str, Any]:
        """Make a batch."""
        if not self.mlm and self.tokenizer.pad_token is None:  # the base class would pad, which these rows do not need
            batch: dict[str, Any] = {"input_ids": torch.tensor([example["input_ids"] for example in examples])}
        else:
            batch = super().torch_call(examples)
        return batch if self.mlm else {**batch, "labels": batch["input_ids"].clone()}


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

    Each document is followed by the end token. Documents are joined in batches of 1000 and cut into blocks; the
    remainder of each batch is dropped. Special tokens spelled out in a text are encoded as ordinary text. `datasets`
    caches the result beside the corpus.

    The rows of a streamed corpus cannot be spread over the whole corpus. Instead, the training split is shuffled
    through a buffer, and the validation split keeps its order.

    Args:
        corpus (`DatasetDict` or `IterableDatasetDict`): Splits with a column `"text"`, as returned by [`load_corpus`].
        tokenizer ([`PreTrainedTokenizerFast`]): Tokenizer with an `eos_token`.
        block_length (`int`, *optional*, defaults to 128): Number of tokens in a row.
        group_size (`int`, *optional*, defaults to 32): Number of rows mixed together.
        seed (`int`, *optional*, defaults to 0): Seed for the order of the rows.
        buffer_size (`int`, *optional*, defaults to 10000): Number of rows in the buffer that shuffles a streamed
            corpus.

    Returns:
        `DatasetDict` or `IterableDatasetDict`: The same splits with the single column `"input_ids"`.

    Raises:
        ValueError: If `block_length` is not positive, the tokenizer has no end token, or a split is shorter than a
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
        if "train" in blocks:
            blocks["train"] = blocks["train"].shuffle(seed=seed, buffer_size=buffer_size)
        return blocks
    blocks = {}
    for name, split in corpus.items():
        with nullcontext() if name == "train" else hide_bars():
            blocks[name] = split.map(_cut_blocks, **cutting, desc="Cutting the text into rows")
    for name, split in blocks.items():
        if split.num_rows == 0:
            more = "" if name == "train" else ", hold out more (`validation_fraction`)"
            raise ValueError(
                f"The {name} split is shorter than `block_length={block_length}`: use a shorter block{more}, or give "
                "more text."
            )
    return DatasetDict(
        {name: split.select(spread_rows(split.num_rows, group_size, seed)) for name, split in blocks.items()}
    )


def _cut_blocks(texts: list[str], tokenizer: PreTrainedTokenizerFast, block_length: int) -> dict[str, Any]:
    documents = tokenizer(
        [text or "" for text in texts],
        add_special_tokens=False,
        split_special_tokens=True,  # an end token spelled out in a text does not end it
        verbose=False,  # a document may exceed model_max_length, but its blocks do not
    )["input_ids"]
    ids = [token for document in documents if document for token in (*document, tokenizer.eos_token_id)]
    ends = range(block_length, len(ids) + 1, block_length)
    return {"input_ids": [ids[end - block_length : end] for end in ends]}


def spread_rows(num_rows: int, group_size: int, seed: int) -> list[int]:
    """Orders the rows of a text so that each group of consecutive rows comes from all parts of it.

    The rows are cut into `group_size` strata. A group takes one row from each stratum, all at the same random place.
    Its rows are therefore about `num_rows / group_size` apart; if `num_rows >= 2 * group_size`, no two of them are
    neighbours in the text. Rows that do not fill a group are evenly spaced and come last.

    Args:
        num_rows (`int`): Number of rows.
        group_size (`int`): Number of rows in a group.
        seed (`int`): Seed for the order of the groups and of the rows within each group.

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
    # a stratum must not always take the same place in a group
    groups = generator.permuted(groups, axis=1)
    return groups.flatten().tolist() + generator.permutation(last).tolist()
