"""Trains byte-level BPE tokenizers, and counts the bytes of their tokens."""

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mot_hf.data.chat import CHAT_TOKENS, add_chat_template

PAD_TOKEN = "<|pad|>"
END_TOKEN = "<|end|>"
MASK_TOKEN = "<|mask|>"
SPECIAL_TOKENS = [PAD_TOKEN, END_TOKEN, MASK_TOKEN]


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 4096, *, chat_template: bool = False
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer, which encodes any text and decodes it unchanged.

    Args:
        texts (`Iterable[str]`): Documents to train on.
        vocab_size (`int`, *optional*, defaults to 4096):
            Number of tokens, including the 256 bytes and the special tokens `<|pad|>`, `<|end|>` (`eos_token`) and
            `<|mask|>`. A short text may yield fewer.
        chat_template (`bool`, *optional*, defaults to `False`):
            Whether the special tokens include those of chats, with the template that uses them; see
            [`~mot_hf.data.chat.add_chat_template`].

    Returns:
        [`PreTrainedTokenizerFast`]: The tokenizer. The same texts always give the same tokenizer.

    Raises:
        ValueError: If `vocab_size` is too small for the bytes and the special tokens.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special_tokens = [*SPECIAL_TOKENS, *(CHAT_TOKENS if chat_template else [])]
    smallest = len(alphabet) + len(special_tokens)
    if vocab_size < smallest:
        raise ValueError(
            f"`vocab_size={vocab_size}` is too small for the bytes and special tokens: use {smallest} or more."
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        mask_token=MASK_TOKEN,
        clean_up_tokenization_spaces=False,
    )
    if chat_template:
        add_chat_template(tokenizer)
    return tokenizer


def token_byte_counts(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Counts the UTF-8 bytes of each token, to turn a loss per token into bits per byte.

    The counts of a text's tokens, as encoded by [`~mot_hf.data.blocks.make_blocks`], add up to its length in bytes.

    Args:
        tokenizer ([`PreTrainedTokenizerFast`]): A byte-level BPE tokenizer.

    Returns:
        `torch.Tensor` of shape `(vocab_size,)`: Number of bytes by token id, 0 for special tokens.

    Raises:
        ValueError: If the tokenizer is not byte-level.
    """
    # Some tokenizers are written in Python.
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if "ByteLevel" not in str(decoder):
        raise ValueError(f"`tokenizer` must be byte-level BPE, but its decoder is {decoder}.")
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    added = tokenizer.added_tokens_decoder
    vocab = tokenizer.get_vocab()
    counts = torch.zeros(max(vocab.values()) + 1, dtype=torch.int64)
    for token, index in vocab.items():
        if index in added:
            counts[index] = 0 if added[index].special else len(token.encode())
        elif alphabet.issuperset(token):
            # each character of the byte alphabet stands for one byte
            counts[index] = len(token)
        else:
            raise ValueError(f"`tokenizer` must be byte-level BPE, but its token {token!r} is not made of bytes.")
    return counts
