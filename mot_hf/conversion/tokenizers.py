"""The tokenizers that go with converted models."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def has_tokenizer(folder: str | Path) -> bool:
    """Tells whether a folder holds the files of a tokenizer.

    Args:
        folder (`str` or `Path`): Folder of a model.

    Returns:
        `bool`: Whether it does.
    """
    return any((Path(folder) / name).is_file() for name in _TOKENIZER_FILES)


def load_tokenizer(folder: str | Path, vocab_size: int) -> PreTrainedTokenizerBase | None:
    """Loads the tokenizer beside a model, if there is one.

    Args:
        folder (`str` or `Path`): Folder of the model.
        vocab_size (`int`): Tokens that the model knows.

    Returns:
        `PreTrainedTokenizerBase` or `None`: The tokenizer; `None` if there is none.

    Raises:
        ValueError: It cannot be read, or has tokens that the model does not know.
    """
    # Without files transformers would make a tokenizer that knows nothing.
    if not has_tokenizer(folder):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"The tokenizer in {str(folder)!r} cannot be read ({error}): save it there again.") from error
    num_tokens = max(tokenizer.get_vocab().values()) + 1
    if num_tokens > vocab_size:
        raise ValueError(
            f"The tokenizer in {str(folder)!r} has {num_tokens} tokens, but the model only `vocab_size` = "
            f"{vocab_size}: save the tokenizer that the model was trained with there."
        )
    return tokenizer
