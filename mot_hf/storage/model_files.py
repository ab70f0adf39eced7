"""Recognizes the files of a saved model: weights, configuration, tokenizer, code."""

import re
from pathlib import Path

from mot_hf import modeling

# Files written by `save_pretrained` of models and tokenizers, and by our own conversions.
_WEIGHTS = r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
_CONFIGURATION = r"config\.json|generation_config\.json"
_TOKENIZER = (
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|chat_template\.(jinja|json)|"
    r"vocab\.(json|txt)|merges\.txt|(tokenizer|spiece|spm|sentencepiece(\.bpe)?)\.model"
)
_MODEL_FILES = re.compile("|".join((_WEIGHTS, _CONFIGURATION, _TOKENIZER)))
_WEIGHT_FILES = re.compile(_WEIGHTS)

# `mot upcycle` writes this file beside its model.
RECEIPT_NAME = "upcycling.json"

# Folder of the code that is saved with a model, and the names of its files.
CODE_FOLDER = Path(modeling.__file__).parent
CODE_FILES = frozenset(path.name for path in CODE_FOLDER.glob("*_mot.py"))

# The only folder that a tokenizer writes.
CHAT_TEMPLATES = "additional_chat_templates"


def is_model_file(name: str) -> bool:
    """Checks whether a file or folder of this name is part of a saved model.

    Args:
        name (`str`): Its name in the model's folder.

    Returns:
        `bool`: Whether it is, so that saving another model there replaces it.
    """
    return name in {CHAT_TEMPLATES, RECEIPT_NAME, *CODE_FILES} or _MODEL_FILES.fullmatch(name) is not None


def is_weight_file(name: str) -> bool:
    """Checks whether a file of this name is part of a saved model's weights, or the index of their shards.

    Args:
        name (`str`): Its name in the model's folder.

    Returns:
        `bool`: Whether it is.
    """
    return _WEIGHT_FILES.fullmatch(name) is not None
