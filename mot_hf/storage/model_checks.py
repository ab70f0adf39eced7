"""Checks that the files of a checkpoint match, before anything of the model's size is allocated."""

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

# What transformers, torch and Python raise for invalid configurations. If our own code fails here, it appears as the
# cause.
BAD_SETTINGS = (
    *(TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError, MemoryError),
    *(ImportError, StrictDataclassError),
)
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\..*", re.DOTALL)
_COMPANIONS = ".mlp.companions."
_LARGEST_GROUP = 2**20  # rows; no batch has more
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int64, torch.int32)
# Attributes of configurations that are saved without being fields.
_SAVED = ("model_type", "num_labels", "output_attentions", "torch_dtype", "rope_scaling", "name_or_path")

Config = TypeVar("Config", bound=PreTrainedConfig)
Model = TypeVar("Model", bound=PreTrainedModel)


def make_config(reader: CheckpointReader, config_class: type[Config]) -> Config:
    """Makes the configuration described in the `config.json` of a checkpoint.

    Args:
        reader ([`CheckpointReader`]): The checkpoint.
        config_class (`type[PreTrainedConfig]`): The configuration's class.

    Returns:
        `PreTrainedConfig`: The configuration.

    Raises:
        ValueError: If `config.json` is not valid, or its sizes cannot be those of the weights.
    """
    name = f"config.json in {str(reader.folder)!r}"
    _refuse_code(reader.config, config_class, name)
    _refuse_absurd_sizes(reader, name)
    try:
        config = config_class.from_dict(copy.deepcopy(reader.config))
    except BAD_SETTINGS as error:
        raise ValueError(f"{name} is not valid: {_explain(error)}") from error
    if not config.return_dict:
        raise ValueError(
            f"{name} sets `return_dict` to {config.return_dict}: remove it, otherwise the model cannot run."
        )
    return config


def make_empty_model(reader: CheckpointReader, model_class: type[Model], config: PreTrainedConfig) -> Model:
    """Makes the model of a checkpoint on the meta device, and checks that the weights match it.

    Args:
        reader ([`CheckpointReader`]): The checkpoint.
        model_class (`type[PreTrainedModel]`): The model's class.
        config (`PreTrainedConfig`): Its configuration.

    Returns:
        `PreTrainedModel`: The model, in evaluation mode, without values.

    Raises:
        ValueError: If the configuration describes no model; if tensors are missing, unexpected, or have another shape
            or type; or if they contain NaN or infinity.
    """
    try:
        with torch.device("meta"):
            model = model_class(config).eval()
    except BAD_SETTINGS as error:
        raise ValueError(
            f"config.json in {str(reader.folder)!r} does not describe a model: {_explain(error)}"
        ) from error
    tensors = _list_tensors(reader, model)
    reader.require({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    _require_kinds(reader, tensors)
    reader.require_finite()
    return model


def load_generation_config(reader: CheckpointReader) -> GenerationConfig | None:
    """Loads the generation settings of a model, if there are any.

    Args:
        reader ([`CheckpointReader`]): The model's checkpoint.

    Returns:
        `GenerationConfig` or `None`: The settings; `None` if there is no such file.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the settings are not valid.
    """
    path = find_file(reader.folder, GENERATION_CONFIG_NAME)
    if path is None:
        return None
    read_object(path)
    try:
        # Not from its fields: settings that were loaded may be saved again where they have no effect.
        return GenerationConfig.from_pretrained(reader.folder)
    except BAD_SETTINGS as error:
        raise ValueError(f"{str(path)!r} is not valid: {_explain(error)}") from error


def _refuse_code(fields: dict[str, Any], config_class: type[PreTrainedConfig], name: str) -> None:
    """Refuse fields that would replace methods or tables of the class, or fetch foreign code."""
    known = {*(field.name for field in dataclass_fields(config_class)), *config_class.attribute_map, *_SAVED}
    foreign = sorted(field for field in fields if field not in known and hasattr(config_class, field))
    if foreign:
        raise ValueError(f"{name} sets {foreign[0]!r}, which is not a setting of a model: remove it.")
    if fields.get("quantization_config") is not None:
        raise ValueError(f"{name} belongs to a quantized model: use the model from before the quantization.")
    for field in ("attn_implementation", "experts_implementation"):
        if "/" in str(fields.get(field)):
            raise ValueError(f"{name} sets {field!r} to foreign code, {fields[field]!r}: remove it.")


def _refuse_absurd_sizes(reader: CheckpointReader, name: str) -> None:
    """Refuse sizes that would cost memory or time as soon as the configuration is made, whatever the weights are."""
    layers = {int(match[1]) for tensor in reader.names if (match := _LAYER.fullmatch(tensor))}
    rows = [reader.shape(tensor)[0] for tensor in reader.names if reader.shape(tensor)]
    limits = {
        "num_hidden_layers": (len(layers), f"the weights have {len(layers)} layers"),
        "num_labels": (max(rows, default=0), "no tensor has as many rows"),
        "group_size": (_LARGEST_GROUP, "no batch has as many rows"),
    }
    for field, (limit, reason) in limits.items():
        value = reader.config.get(field)
        if isinstance(value, int | float) and value > limit:
            raise ValueError(f"{name} sets `{field}` to {value}, but {reason}: fetch or save the model again.")


def _list_tensors(reader: CheckpointReader, model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors that the checkpoint must have, on the meta device.

    Models from before the statistics load without them, and run in the modes that do not need them.
    """
    tensors = dict(model.state_dict())
    if not any(_COMPANIONS in name for name in reader.names):
        tensors = {name: tensor for name, tensor in tensors.items() if _COMPANIONS not in name}
    if model.config.tie_word_embeddings and not _has_tied_copy(reader, model):
        tensors.pop("lm_head.weight", None)
    return tensors


def _has_tied_copy(reader: CheckpointReader, model: PreTrainedModel) -> bool:
    """Whether weights that two layers share are stored twice, as some writers do."""
    tied = [(one, other) for one, other in model.all_tied_weights_keys.items() if {one, other} <= set(reader.names)]
    return bool(tied) and all(torch.equal(reader.load(one), reader.load(other)) for one, other in tied)


def _require_kinds(reader: CheckpointReader, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        kinds = _FLOATS if tensor.is_floating_point() else _INTEGERS
        if reader.dtype(name) not in kinds:
            raise ValueError(
                f"The checkpoint in {str(reader.folder)!r} has {name} as {reader.dtype(name)}, not as one of "
                f"{', '.join(map(str, kinds))}: use the model from before it was quantized or converted."
            )


def _explain(error: BaseException) -> str:
    """Return the reason that an error gives, with its type unless it is a plain `ValueError`."""
    if isinstance(error, StrictDataclassError):
        return str(error.__cause__ or error)
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
