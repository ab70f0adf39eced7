"""Whether a tokenizer fits a model: every token has a row of the embedding, and every id means what it meant."""

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

# Those that the `Trainer` copies into the configuration when training begins.
_COPIED_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


class VocabularyCheck(TrainerCallback):
    """Refuses to train a model whose embedding has no row for some token of the trainer's tokenizer.

    Such a token ends a run at the first text that holds it, on a GPU with an error that names nothing. Processing
    classes without a vocabulary are not looked at.

    Raises:
        ValueError: A token is beyond the vocabulary; says how many there are, and what to do.
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
                f"The tokenizer has {num_tokens} tokens (such as {last[0]!r}, id {last[1]}), and the model has "
                f"embeddings for {num_rows} (`config.vocab_size`): call `model.resize_token_embeddings({num_tokens})` "
                "before training, or take the tokenizer that the model was trained with."
            )


def count_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Counts the rows of an embedding that a tokenizer needs.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.

    Returns:
        `int`: One more than its highest id, so more than its tokens if it leaves some ids out.
    """
    ids = [*tokenizer.get_vocab().values(), *(getattr(tokenizer, name, None) for name in _COPIED_IDS)]
    return 1 + max((token_id for token_id in ids if token_id is not None), default=-1)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    """Loads the tokenizer of a folder or a model, if it has one.

    Args:
        name (`str`): Folder or name.

    Returns:
        `PreTrainedTokenizerBase` or `None`: The tokenizer; `None` if there is none.

    Raises:
        OSError: There is no model of that name.
    """
    # Without files transformers would make a tokenizer that knows nothing.
    if Path(name).is_dir() and not has_tokenizer(name):
        return None
    tokenizer = AutoTokenizer.from_pretrained(name)
    return tokenizer if tokenizer.get_vocab() else None


def complete_tokenizer(tokenizer: PreTrainedTokenizerBase, masked: bool = False) -> PreTrainedTokenizerBase:
    """Adds the tokens that training needs and a tokenizer lacks, and says which.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer, which is changed.
        masked (`bool`, *optional*, defaults to `False`): Whether a masked language model is trained.

    Returns:
        `PreTrainedTokenizerBase`: The same tokenizer.
    """
    # For padding the end token would be left out of the loss.
    needed = {"pad_token": PAD_TOKEN} | ({"mask_token": MASK_TOKEN} if masked else {})
    added = {name: token for name, token in needed.items() if getattr(tokenizer, name) is None}
    if added:
        tokenizer.add_special_tokens(added)
        logger.warning("The tokenizer got the special tokens that it lacks: %s.", added)
    if tokenizer.eos_token is None:  # BERT's tokenizers end a text with their separator
        tokenizer.eos_token = tokenizer.sep_token
    return tokenizer


def enlarge_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives a model rows of the embeddings for all tokens of a tokenizer, and says so.

    New rows are drawn around the mean of the others. A model that has more rows than there are tokens keeps them.

    Args:
        model (`PreTrainedModel`): The model, without adapters.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
    """
    num_tokens, num_rows = count_tokens(tokenizer), model.config.get_text_config().vocab_size
    if num_tokens > num_rows:
        model.resize_token_embeddings(num_tokens)
        logger.warning(
            "The tokenizer has %d tokens and the model had embeddings for %d: it got %d more, which are not trained.",
            num_tokens,
            num_rows,
            num_tokens - num_rows,
        )


def check_meanings(
    tokenizer: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase, *, name: str, own_name: str
) -> None:
    """Refuses a tokenizer whose ids stand for other tokens than those that a model has learned.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer asked for; it may have more tokens than the other.
        own (`PreTrainedTokenizerBase`): The tokenizer that the model was trained with.
        name (`str`): What to call the first.
        own_name (`str`): What to call the model.

    Raises:
        ValueError: An id that both have stands for different tokens.
    """
    tokens, own_tokens = ({number: token for token, number in each.get_vocab().items()} for each in (tokenizer, own))
    changed = sorted(number for number in tokens.keys() & own_tokens.keys() if tokens[number] != own_tokens[number])
    if changed:
        first = changed[0]
        raise ValueError(
            f"{name} (of {len(tokens)} tokens) is another tokenizer than that of {own_name} (of {len(own_tokens)}): "
            f"{len(changed)} ids mean other tokens, such as {first}, {own_tokens[first]!r} there and "
            f"{tokens[first]!r} here. Take that one, or train a new model."
        )
