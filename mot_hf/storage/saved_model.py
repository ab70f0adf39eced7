"""MoT models in folders, checked as a whole before they are used."""

import os
from dataclasses import dataclass
from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerBase

from mot_hf.devices import find_device, find_dtype
from mot_hf.modeling import MoTConfig, MoTPreTrainedModel
from mot_hf.registration import AUTO_CLASSES
from mot_hf.storage.checkpoint_files import CheckpointReader
from mot_hf.storage.model_checks import load_generation_config, make_config, make_empty_model
from mot_hf.storage.tokenizers import load_tokenizer

_CLASSES = {model_class.__name__: model_class for model_class, _ in AUTO_CLASSES.values()}


@dataclass(frozen=True)
class SavedModel:
    """A complete MoT model in a folder, without its weights in memory.

    Args:
        reader ([`CheckpointReader`]): Reader of its tensors.
        model ([`MoTPreTrainedModel`]): The model, on the meta device.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The tokenizer beside it.
        generation_config (`GenerationConfig`, *optional*): The generation settings beside it.
    """

    reader: CheckpointReader
    model: MoTPreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    generation_config: GenerationConfig | None

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder also has a tokenizer."""
        return self.tokenizer is not None


def read_model(model_dir: str | os.PathLike[str]) -> SavedModel:
    """Checks that a folder contains a MoT model that can be loaded and used, without loading it.

    The check covers every value of the weights, one tensor at a time. It takes about as long as reading the files.

    Args:
        model_dir (`str` or `os.PathLike`): Folder of the model.

    Returns:
        [`SavedModel`]: The model.

    Raises:
        OSError: If the folder, its configuration, or a file of its weights is missing.
        ValueError: If it is not a MoT model, a file is damaged, or the files do not match: tensors are missing,
            unexpected, or of another shape or type, values are NaN or infinite, or the tokenizer has more tokens than
            the model.
    """
    reader = CheckpointReader(Path(model_dir))
    name = find_class_name(reader) or "MoTModel"
    if name not in _CLASSES:
        raise ValueError(
            f"config.json in {str(model_dir)!r} names the class {name!r}, which is not one of {', '.join(_CLASSES)}."
        )
    config = make_config(reader, MoTConfig)
    tokenizer = load_tokenizer(reader.folder, config.vocab_size)
    generation_config = load_generation_config(reader)
    return SavedModel(reader, make_empty_model(reader, _CLASSES[name], config), tokenizer, generation_config)


def open_model(
    model_dir: str | os.PathLike[str], *, device: str | None = None, dtype: str = "auto"
) -> tuple[MoTPreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a MoT model and its tokenizer, after all checks of [`read_model`].

    Args:
        model_dir (`str` or `os.PathLike`): Folder of the model and its tokenizer.
        device (`str`, *optional*): Device to load it on, see [`~mot_hf.devices.find_device`].
        dtype (`str`, *optional*, defaults to `"auto"`): Precision to load it in; `"auto"` takes the checkpoint's.

    Returns:
        `tuple[MoTPreTrainedModel, PreTrainedTokenizerBase]`: The model, in evaluation mode, and the tokenizer.

    Raises:
        OSError: If the folder or a required file is missing.
        ValueError: If it contains no MoT model or no tokenizer, or the files do not match.
    """
    target, precision = find_device(device), find_dtype(dtype)
    saved = read_model(model_dir)
    if saved.tokenizer is None:
        raise ValueError(
            f"{str(model_dir)!r} has no tokenizer: save it there (`tokenizer.save_pretrained`). The Trainer saves it "
            "with every checkpoint if you give it as `processing_class`."
        )
    model = type(saved.model).from_pretrained(saved.reader.folder, config=saved.model.config, dtype=precision)
    return model.to(target), saved.tokenizer


def find_class_name(reader: CheckpointReader) -> str | None:
    """Finds the class name of a MoT model.

    Args:
        reader ([`CheckpointReader`]): The model's checkpoint.

    Returns:
        `str` or `None`: The name in its `config.json`; `None` if there is none.

    Raises:
        ValueError: If it is not a MoT model, or the entry is not a name.
    """
    folder, model_type = str(reader.folder), reader.config.get("model_type")
    if model_type != MoTConfig.model_type:
        raise ValueError(f"{folder!r} contains a model of type {model_type!r}, not 'mot'.")
    names = reader.config.get("architectures")
    if not names and (names is None or isinstance(names, list)):
        return None
    if not (isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)):
        raise ValueError(f"config.json in {folder!r} must name one class in `architectures`, got {names!r}.")
    return names[0]
