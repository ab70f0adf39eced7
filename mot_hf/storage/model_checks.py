"""Whether a checkpoint's files fit one another, found out before anything of the model's size is made."""

import copy
import re
from dataclasses import fields as dataclass_fields
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from mot_hf.storage.checkpoint_files import CheckpointReader
from mot_hf.storage.plain_files import find_file, read_object

# What transformers, torch and Python raise for a configuration that somebody made up. Code of ours that fails here is
# named as the cause.
BAD_SETTINGS = (
    *(TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError, MemoryError),
    *(ImportError, StrictDataclassError),
)
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\..*", re.DOTALL)
_COMPANIONS = ".mlp.companions."
_LARGEST_GROUP = 2**20  # rows; more are no batch
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int64, torch.int32)
# Attributes of configurations that are no fields, but saved.
_SAVED = ("model_type", "num_labels", "output_attentions", "torch_dtype", "rope_scaling", "name_or_path")

Config = TypeVar("Config", bound=PreTrainedConfig)
Model = TypeVar("Model", bound=PreTrainedModel)


def make_config(reader: CheckpointReader, config_class: type[Config]) -> Config:
    """Makes the configuration that a checkpoint's `config.json` describes.

    Args:
        reader ([`CheckpointReader`]): The checkpoint.
        config_class (`type[PreTrainedConfig]`): The configuration's class.

    Returns:
        `PreTrainedConfig`: The configuration.

    Raises:
        ValueError: `config.json` describes none, or one that has nothing to do with the weights.
    """
    name = f"config.json in {str(reader.folder)!r}"
    _refuse_code(reader.config, config_class, name)
    _refuse_absurd_sizes(reader, name)
    try:
        config = config_class.from_dict(copy.deepcopy(reader.config))
    except BAD_SETTINGS as error:
        raise ValueError(f"{name} is not valid: {_explain(error)}") from error
    if not config.return_dict:
        raise ValueError(f"{name} sets `return_dict` to {config.return_dict}: remove it, so that models can be run.")
    return config


def make_empty_model(reader: CheckpointReader, model_class: type[Model], config: PreTrainedConfig) -> Model:
    """Makes the model of a checkpoint on the meta device, after the weights were found to be its.

    Args:
        reader ([`CheckpointReader`]): The checkpoint.
        model_class (`type[PreTrainedModel]`): The model's class.
        config (`PreTrainedConfig`): Its configuration.

    Returns:
        `PreTrainedModel`: The model, in evaluation mode, without values.

    Raises:
        ValueError: The configuration describes no model, or tensors are missing, of another shape or type, there in
            excess, or hold values that are no finite numbers.
    """
    try:
        with torch.device("meta"):
            model = model_class(config).eval()
    except BAD_SETTINGS as error:
        raise ValueError(f"config.json in {str(reader.folder)!r} describes no model: {_explain(error)}") from error
    tensors = _list_tensors(reader, model)
    reader.require({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    _require_kinds(reader, tensors)
    reader.require_finite()
    return model


def load_generation_config(reader: CheckpointReader) -> GenerationConfig | None:
    """Loads the generation settings beside a model, if there are some.

    Args:
        reader ([`CheckpointReader`]): The model's checkpoint.

    Returns:
        `GenerationConfig` or `None`: The settings; `None` if there is no such file.

    Raises:
        OSError: What has the file's name cannot be read.
        ValueError: It holds no such settings.
    """
    path = find_file(reader.folder, GENERATION_CONFIG_NAME)
    if path is None:
        return None
    fields = read_object(path)
    try:
        return GenerationConfig.from_dict(fields)
    except BAD_SETTINGS as error:
        raise ValueError(f"{str(path)!r} is not valid: {_explain(error)}") from error


def _refuse_code(fields: dict[str, Any], config_class: type[PreTrainedConfig], name: str) -> None:
    """Refuse what would take the place of a class's methods and tables, or fetch code of others."""
    known = {*(field.name for field in dataclass_fields(config_class)), *config_class.attribute_map, *_SAVED}
    foreign = sorted(field for field in fields if field not in known and hasattr(config_class, field))
    if foreign:
        raise ValueError(f"{name} sets {foreign[0]!r}, which is no setting of a model: remove it.")
    if fields.get("quantization_config") is not None:
        raise ValueError(f"{name} is that of a quantized model: take the model that it was made of.")
    for field in ("attn_implementation", "experts_implementation"):
        if "/" in str(fields.get(field)):
            raise ValueError(f"{name} sets {field!r} to code of others, {fields[field]!r}: remove it.")


def _refuse_absurd_sizes(reader: CheckpointReader, name: str) -> None:
    """Refuse sizes that cost memory or time as soon as there is a configuration, whatever the weights are."""
    layers = {int(match[1]) for tensor in reader.names if (match := _LAYER.fullmatch(tensor))}
    rows = [reader.shape(tensor)[0] for tensor in reader.names if reader.shape(tensor)]
    limits = {
        "num_hidden_layers": (len(layers), f"the weights are of {len(layers)} layers"),
        "num_labels": (max(rows, default=0), "no tensor has as many rows"),
        "group_size": (_LARGEST_GROUP, "no batch has as many rows"),
    }
    for field, (limit, reason) in limits.items():
        value = reader.config.get(field)
        if isinstance(value, int | float) and value > limit:
            raise ValueError(f"{name} sets `{field}` to {value}, but {reason}: fetch or save the model again.")


def _list_tensors(reader: CheckpointReader, model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors that the checkpoint must hold, on the meta device.

    Models of before the statistics load without them, and answer in the modes that need none.
    """
    tensors = dict(model.state_dict())
    if not any(_COMPANIONS in name for name in reader.names):
        tensors = {name: tensor for name, tensor in tensors.items() if _COMPANIONS not in name}
    if model.config.tie_word_embeddings and not _has_tied_copy(reader, model):
        tensors.pop("lm_head.weight", None)
    return tensors


def _has_tied_copy(reader: CheckpointReader, model: PreTrainedModel) -> bool:
    """Whether the weights shared by two layers are stored twice, as some writers do."""
    tied = [(one, other) for one, other in model.all_tied_weights_keys.items() if {one, other} <= set(reader.names)]
    return bool(tied) and all(torch.equal(reader.load(one), reader.load(other)) for one, other in tied)


def _require_kinds(reader: CheckpointReader, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        kinds = _FLOATS if tensor.is_floating_point() else _INTEGERS
        if reader.dtype(name) not in kinds:
            raise ValueError(
                f"The checkpoint in {str(reader.folder)!r} holds {name} as {reader.dtype(name)}, not as one of "
                f"{', '.join(map(str, kinds))}: take the model before it was quantized or converted."
            )


def _explain(error: BaseException) -> str:
    """The reason that an error gives, with its kind where that says more than the text."""
    if isinstance(error, StrictDataclassError):
        return str(error.__cause__ or error)
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
