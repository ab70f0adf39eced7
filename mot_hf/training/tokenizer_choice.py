"""Chooses the tokenizer of a language modeling run."""

import logging

from transformers import PreTrainedTokenizerBase

from mot_hf.data.chat import add_chat_template
from mot_hf.modeling import MoTConfig
from mot_hf.training.arguments import CorpusArguments, ModelArguments
from mot_hf.training.resuming import load_checkpoint_tokenizer
from mot_hf.training.vocabulary import check_meanings, complete_tokenizer, count_tokens, load_tokenizer

logger = logging.getLogger(__name__)


def find_tokenizer(
    model_args: ModelArguments, args: CorpusArguments, config: MoTConfig, checkpoint: str | None, masked: bool
) -> PreTrainedTokenizerBase | None:
    """Finds a run's tokenizer: the one of the checkpoint to resume from, else the requested one, else the model's.

    Args:
        model_args ([`ModelArguments`]): Which model to train further, if any.
        args ([`CorpusArguments`]): Which tokenizer is requested, if any.
        config ([`MoTConfig`]): Configuration of the model.
        checkpoint (`str`, *optional*): Folder of the checkpoint to resume from.
        masked (`bool`): Whether a masked language model is trained.

    Returns:
        `PreTrainedTokenizerBase` or `None`: The tokenizer, with the special tokens that training needs; `None` if a
        new one must be trained on the text.

    Raises:
        ValueError: The requested tokenizer differs from the one of the checkpoint or the model, `vocab_size` is not
            its size, or the checkpoint to resume from has none.
        OSError: There is no tokenizer with this name.
    """
    if checkpoint and (saved := load_checkpoint_tokenizer(checkpoint)):
        return _resume_tokenizer(args, saved, checkpoint, masked)
    name = args.tokenizer or model_args.model_name_or_path
    if not name:
        if checkpoint:
            raise ValueError(
                f"The checkpoint {checkpoint!r} has no tokenizer, and a new one may assign the ids to other tokens: "
                "set --tokenizer, for example to another checkpoint of the run that has the tokenizer."
            )
        return None
    if checkpoint:
        logger.warning("The checkpoint %r has no tokenizer to compare with the one of %r.", checkpoint, name)
    tokenizer = load_named_tokenizer(name)
    if args.tokenizer and model_args.model_name_or_path:
        _compare_with_model(tokenizer, args.tokenizer, model_args.model_name_or_path)
    tokenizer = complete_tokenizer(tokenizer, masked)
    if args.chat_template and tokenizer.chat_template is None:
        add_chat_template(tokenizer)
    num_tokens = count_tokens(tokenizer)
    known = {num_tokens, config.vocab_size} if model_args.model_name_or_path else {num_tokens}
    if args.is_meant("vocab_size") and args.vocab_size not in known:
        raise ValueError(
            f"`vocab_size={args.vocab_size}` is only for a tokenizer that is trained on the text, but the one of "
            f"{name!r} has {num_tokens} tokens: remove vocab_size."
        )
    return tokenizer


def _resume_tokenizer(
    args: CorpusArguments, saved: PreTrainedTokenizerBase, checkpoint: str, masked: bool
) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer. Training one on a changed text would assign the ids to other tokens."""
    if args.chat_template and saved.chat_template is None:
        raise ValueError(
            f"`chat_template=True` adds tokens, but the run of the checkpoint {checkpoint!r} goes on with its own: "
            "remove chat_template, or start a new run in another folder."
        )
    if args.tokenizer:
        asked = complete_tokenizer(load_named_tokenizer(args.tokenizer), masked)
        check_meanings(asked, saved, name=f"`tokenizer={args.tokenizer!r}`", own_name=f"the checkpoint {checkpoint!r}")
        if len(asked) != len(saved):
            raise ValueError(
                f"`tokenizer={args.tokenizer!r}` has {len(asked)} tokens, but the tokenizer of the checkpoint "
                f"{checkpoint!r} has {len(saved)}: remove --tokenizer."
            )
        return saved
    if args.is_meant("vocab_size") and (args.vocab_size or 0) < count_tokens(saved):  # a short text may give fewer
        raise ValueError(
            f"`vocab_size={args.vocab_size}` is less than the {count_tokens(saved)} tokens of the checkpoint "
            f"{checkpoint!r}: use the checkpoint's vocab_size, or start a new run in another folder."
        )
    logger.warning("Using the tokenizer of the checkpoint %r with %d tokens.", checkpoint, len(saved))
    return saved


def load_named_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer.

    Args:
        name (`str`): Its folder, or its name on the Hub.

    Returns:
        `PreTrainedTokenizerBase`: The tokenizer.

    Raises:
        OSError: There is none.
    """
    if (tokenizer := load_tokenizer(name)) is None:
        raise OSError(f"{name!r} has no tokenizer: choose one with --tokenizer.")
    return tokenizer


def _compare_with_model(tokenizer: PreTrainedTokenizerBase, name: str, model_name: str) -> None:
    own = load_tokenizer(model_name)
    if own is None:
        logger.warning(
            "`model_name_or_path=%r` has no tokenizer to compare with `tokenizer=%r`: make sure that it is the one "
            "that the model was trained with.",
            model_name,
            name,
        )
    else:
        check_meanings(tokenizer, own, name=f"`tokenizer={name!r}`", own_name=f"`model_name_or_path={model_name!r}`")
