"""Checks that a tokenizer fits a model: each token has an embedding, and each id stands for the same token."""

import logging
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from mot_hf.data.tokenizer import MASK_TOKEN, PAD_TOKEN
from mot_hf.storage.tokenizers import has_tokenizer

logger = logging.getLogger(__name__)

# Special tokens that the `Trainer` copies to the configuration when training starts.
_COPIED_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
_ROW_MULTIPLE = 64


class VocabularyCheck(TrainerCallback):
    """Refuses to train a model that has no embedding for some token of the trainer's tokenizer.

    Such a token would end the run at the first text that contains it, on a GPU with an obscure error. Processing
    classes without a vocabulary are not checked.

    Raises:
        ValueError: A token is beyond the vocabulary. The message gives both sizes, and what to do.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Compare the sizes."""
        owner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        if owner is None or not hasattr(tokenizer, "get_vocab"):
            return
        num_rows = getattr(owner.config.get_text_config(), "vocab_size", None)
        num_tokens = count_tokens(tokenizer)
        if num_rows is not None and num_tokens > num_rows:
            last = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
            raise ValueError(
                f"The tokenizer has {num_tokens} tokens (such as {last[0]!r}, id {last[1]}), but the model has "
                f"embeddings for {num_rows} (`config.vocab_size`): call `model.resize_token_embeddings({num_tokens})` "
                "before training, or use the tokenizer that the model was trained with."
            )


def count_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Computes the number of embedding rows that a tokenizer needs.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.

    Returns:
        `int`: The highest id plus 1. This is more than the number of tokens if some ids are unused.
    """
    ids = [*tokenizer.get_vocab().values(), *(getattr(tokenizer, name, None) for name in _COPIED_IDS)]
    return 1 + max((token_id for token_id in ids if token_id is not None), default=-1)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    """Loads the tokenizer of a folder or a model, if it has one.

    Args:
        name (`str`): Folder or name of a model.

    Returns:
        `PreTrainedTokenizerBase` or `None`: The tokenizer, or `None` if there is none.

    Raises:
        OSError: There is no model with this name.
    """
    # Without files, transformers would create a tokenizer with an empty vocabulary.
    if Path(name).is_dir() and not has_tokenizer(name):
        return None
    tokenizer = AutoTokenizer.from_pretrained(name)
    return tokenizer if tokenizer.get_vocab() else None


def complete_tokenizer(tokenizer: PreTrainedTokenizerBase, masked: bool = False) -> PreTrainedTokenizerBase:
    """Adds the special tokens that training needs if the tokenizer lacks them, and logs which ones.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer, which is changed in place.
        masked (`bool`, *optional*, defaults to `False`): Whether a masked language model is trained.

    Returns:
        `PreTrainedTokenizerBase`: The same tokenizer.
    """
    # If the end token were used for padding, it would be excluded from the loss.
    needed = {"pad_token": PAD_TOKEN} | ({"mask_token": MASK_TOKEN} if masked else {})
    added = {name: token for name, token in needed.items() if getattr(tokenizer, name) is None}
    if added:
        tokenizer.add_special_tokens(added)
        logger.warning("Added special tokens that the tokenizer lacks: %s.", added)
    if tokenizer.eos_token is None:  # BERT's tokenizers end a text with the separator token
        tokenizer.eos_token = tokenizer.sep_token
    return tokenizer


def enlarge_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, padded: bool = False) -> None:
    """Enlarges the embeddings of a model to all tokens of a tokenizer, and logs it.

    New rows are sampled around the mean of the others. If the model has more rows than tokens, it keeps them.

    Args:
        model (`PreTrainedModel`): The model, without adapters.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        padded (`bool`, *optional*, defaults to `False`): Whether a number of rows that is a multiple of 64, as
            matrix products and divided vocabularies like it, stays one; adapters are saved for the exact number.
    """
    num_tokens, num_rows = count_tokens(tokenizer), model.config.get_text_config().vocab_size
    if num_tokens > num_rows:
        multiple = _ROW_MULTIPLE if padded and num_rows % _ROW_MULTIPLE == 0 else None
        embeddings = model.resize_token_embeddings(num_tokens, pad_to_multiple_of=multiple)
        logger.warning(
            "The tokenizer has %d tokens, but the model had embeddings for %d: added %d untrained ones.",
            num_tokens,
            num_rows,
            len(embeddings.weight) - num_rows,
        )


def find_new_tokens(tokenizer: PreTrainedTokenizerBase, model_name_or_path: str) -> list[int]:
    """Finds the tokens that a model was not trained with.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer of a run.
        model_name_or_path (`str`): The model that it starts from.

    Returns:
        `list[int]`: Ids of the tokens that the model's own tokenizer does not have; none if it has no tokenizer.
    """
    own = load_tokenizer(model_name_or_path)
    known = None if own is None else own.get_vocab()
    vocabulary = tokenizer.get_vocab()
    return [] if known is None else sorted(number for token, number in vocabulary.items() if token not in known)


def check_meanings(
    tokenizer: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase, *, name: str, own_name: str
) -> None:
    """Refuses a tokenizer whose ids stand for other tokens than in the model's training.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The requested tokenizer. It may have more tokens than the other.
        own (`PreTrainedTokenizerBase`): The tokenizer that the model was trained with.
        name (`str`): Name of the requested tokenizer in the message.
        own_name (`str`): Name of the model in the message.

    Raises:
        ValueError: An id stands for different tokens in the two tokenizers.
    """
    tokens, own_tokens = ({number: token for token, number in each.get_vocab().items()} for each in (tokenizer, own))
    changed = sorted(number for number in tokens.keys() & own_tokens.keys() if tokens[number] != own_tokens[number])
    if changed:
        first = changed[0]
        raise ValueError(
            f"{name} ({len(tokens)} tokens) differs from the tokenizer of {own_name} ({len(own_tokens)} tokens): "
            f"{len(changed)} ids stand for other tokens, such as {first} for {tokens[first]!r} instead of "
            f"{own_tokens[first]!r}. Use the tokenizer of {own_name}, or train a new model."
        )
