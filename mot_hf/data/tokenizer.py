"""Byte-level BPE tokenizers: training one, and the bytes behind its tokens."""

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD_TOKEN = "<|pad|>"
END_TOKEN = "<|end|>"
MASK_TOKEN = "<|mask|>"
SPECIAL_TOKENS = [PAD_TOKEN, END_TOKEN, MASK_TOKEN]


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

    The counts over a text's tokens add up to its length, as [`~mot_hf.data.blocks.make_blocks`] encodes it.

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
