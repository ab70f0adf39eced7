"""LoRA adapters for MoT models and dense ones, by PEFT."""

from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mot_hf.modeling import MoTPreTrainedModel

if TYPE_CHECKING:
    from peft import PeftModel, TaskType

_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def add_lora(
    model: PreTrainedModel, *, rank: int, alpha: int | float = 16, task_type: "TaskType | str | None" = None
) -> "PeftModel":
    """Freezes a model and adds LoRA adapters to its attention, dense layers and experts.

    The statistics of the typical group are trained on, and saved with the adapters. A model that is not MoT gets
    adapters on all linear layers below its head, and on its experts where they are named as MoT's (as Qwen3-MoE's).

    Args:
        model ([`MoTPreTrainedModel`] or `PreTrainedModel`): The model.
        rank (`int`): Rank of the adapters, at least 1.
        alpha (`int` or `float`, *optional*, defaults to 16): Scale of the adapters, divided by their rank; above 0.
        task_type (`str`, *optional*): PEFT's word for the head: `"CAUSAL_LM"`, `"SEQ_CLS"` or `"TOKEN_CLS"`; a
            classification head is then trained as a whole.

    Returns:
        `PeftModel`: The model with adapters.

    Raises:
        ValueError: `rank` or `alpha` is too small, or the model has adapters already or no linear layers.
        ImportError: PEFT is not installed.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"`rank={rank!r}` must be a whole number of at least 1.")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
        raise ValueError(f"`alpha={alpha!r}` must be a number above 0.")
    from peft import LoraConfig, get_peft_model

    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "The model has adapters already. Merge them into it first: `PeftModel.from_pretrained(base, "
            "folder).merge_and_unload()`, saved in a folder of its own."
        )
    parameters = [name for name, _ in model.named_parameters()]  # an expert's are of no module that PEFT knows
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        task_type=task_type,
        target_modules=_find_targets(model),
        target_parameters=[name for name in _EXPERTS if any(path.endswith(name) for path in parameters)] or None,
        modules_to_save=_find_whole(model, task_type) or None,
    )
    return get_peft_model(model, config)


def _find_targets(model: PreTrainedModel) -> list[str]:
    if isinstance(model, MoTPreTrainedModel):
        return _PROJECTIONS
    # PEFT's own "all-linear" takes the heads of some models too, and then cannot train these as a whole.
    backbone = {id(module) for module in model.base_model.modules() if isinstance(module, nn.Linear | Conv1D)}
    names = [name for name, module in model.named_modules() if id(module) in backbone]
    if not names:
        raise ValueError(f"{type(model).__name__} has no linear layers for adapters: train it without `rank`.")
    return names


def _find_whole(model: PreTrainedModel, task_type: "TaskType | str | None") -> list[str]:
    """Modules that are trained, or gathered, and saved as a whole."""
    if isinstance(model, MoTPreTrainedModel):
        return ["companions"] if "sparse" in model.config.mlp_layer_types else []
    if task_type not in ("SEQ_CLS", "TOKEN_CLS"):
        return []
    # A new head may be more than the layer that PEFT knows.
    children = {name: child for name, child in model.named_children() if child is not model.base_model}
    return [name for name, child in children.items() if any(True for _ in child.parameters())]
