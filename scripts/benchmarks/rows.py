"""Rows of text for benchmarks of trained models."""

from dataclasses import asdict
from typing import Any

from datasets import DatasetDict
from transformers import PreTrainedTokenizerBase

from mot_hf.data.blocks import make_blocks
from mot_hf.data.corpus import load_corpus
from mot_hf.data.default_corpus import default_corpus_info
from mot_hf.data.sources import name_source


def load_rows(
    tokenizer: PreTrainedTokenizerBase, source: str | None, *, block_length: int, group_size: int = 32, seed: int = 0
) -> DatasetDict:
    """Loads a text and cuts it into rows, in the order of training.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer of the model.
        source (`str`, *optional*): The text, as in [`load_corpus`]; `None` for Python's standard library.
        block_length (`int`): Tokens T of a row.
        group_size (`int`, *optional*, defaults to 32): Rows G of a group.
        seed (`int`, *optional*, defaults to 0): Seed of the order.

    Returns:
        `DatasetDict`: Splits `"train"` and `"validation"` with the column `"input_ids"`.

    Raises:
        ValueError: As [`load_corpus`] and [`make_blocks`].
        OSError: The text cannot be read.
    """
    corpus = load_corpus(source)
    return DatasetDict(make_blocks(corpus, tokenizer, block_length=block_length, group_size=group_size, seed=seed))


def describe_corpus(source: str | None) -> str | dict[str, Any]:
    """Describes a text to others, without its folder on this machine.

    Args:
        source (`str`, *optional*): The text; `None` for Python's standard library.

    Returns:
        `str` or `dict`: The name of a text that was given; of the standard library its version, size and digest.
    """
    if source is not None:
        return name_source(source)
    info = asdict(default_corpus_info())
    del info["source"]  # a folder of this machine
    return info
