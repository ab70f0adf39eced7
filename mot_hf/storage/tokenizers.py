"""The tokenizers saved with models."""

import os
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mot_hf.storage.plain_files import find_file

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# Other files of a tokenizer; none may be a link out of the folder.
_OTHER_FILES = (
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model"),
    *("spiece.model", "sentencepiece.bpe.model", "tekken.json", "chat_template.jinja", "chat_template.json"),
)


def has_tokenizer(folder: str | os.PathLike[str]) -> bool:
    """Checks whether a folder has the files of a tokenizer.

    Args:
        folder (`str` or `os.PathLike`): Folder of a model.

    Returns:
        `bool`: Whether it does.
    """
    return any((Path(folder) / name).is_file() for name in _TOKENIZER_FILES)


def load_tokenizer(folder: str | os.PathLike[str], vocab_size: int) -> PreTrainedTokenizerBase | None:
    """Loads the tokenizer of a model, if there is one, and tries it.

    Args:
        folder (`str` or `os.PathLike`): Folder of the model.
        vocab_size (`int`): Number of tokens that the model knows.

    Returns:
        `PreTrainedTokenizerBase` or `None`: The tokenizer; `None` if there is none.

    Raises:
        OSError: If one of its files is a folder, a pipe or a broken link.
        ValueError: If it cannot be read, or has tokens that the model does not know.
    """
    for name in (*_TOKENIZER_FILES, *_OTHER_FILES):
        find_file(folder, name)
    # Without files, transformers would make an empty tokenizer.
    if not has_tokenizer(folder):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        num_tokens = max(tokenizer.get_vocab().values(), default=-1) + 1
        _try(tokenizer)
    except Exception as error:  # tokenizers raises a plain Exception for damaged files
        raise ValueError(
            f"The tokenizer in {str(folder)!r} cannot be read ({type(error).__name__}: {error}): save it again."
        ) from error
    if num_tokens > vocab_size:
        raise ValueError(
            f"The tokenizer in {str(folder)!r} has {num_tokens} tokens, but the model only has "
            f"`vocab_size={vocab_size}`: save the tokenizer there that the model was trained with."
        )
    return tokenizer


def _try(tokenizer: PreTrainedTokenizerBase) -> None:
    """Use a tokenizer as the commands do, since loading does not check its settings."""
    ids = tokenizer(["a word"], add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"][0]
    tokenizer.decode(ids)
    if ids and tokenizer.pad_token is not None:
        tokenizer.pad([{"input_ids": ids}, {"input_ids": ids}], return_tensors="pt")
