"""LoRA adapters for MoT models, by PEFT."""

from typing import TYPE_CHECKING

from mot_hf.modeling import MoTPreTrainedModel

if TYPE_CHECKING:
    from peft import PeftModel, TaskType

_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def add_lora(
    model: MoTPreTrainedModel, *, rank: int, alpha: int = 16, task_type: "TaskType | str | None" = None
) -> "PeftModel":
    """Freezes a model and adds LoRA adapters to its attention, dense layers and experts.

    The statistics of the typical group are trained on, and saved with the adapters.

    Args:
        model ([`MoTPreTrainedModel`]): The model.
        rank (`int`): Rank of the adapters, at least 1.
        alpha (`int`, *optional*, defaults to 16): Scale of the adapters, divided by their rank.
        task_type (`str`, *optional*): PEFT's word for the head: `"CAUSAL_LM"`, `"SEQ_CLS"` or `"TOKEN_CLS"`; the layer
            of a classification head is then trained as a whole.

    Returns:
        `PeftModel`: The model with adapters.

    Raises:
        ValueError: `rank` is below 1.
        ImportError: PEFT is not installed.
    """
    if rank < 1:
        raise ValueError(f"`rank={rank}` must be at least 1.")
    from peft import LoraConfig, get_peft_model

    has_experts = "sparse" in model.config.mlp_layer_types
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        task_type=task_type,
        target_modules=_PROJECTIONS,
        target_parameters=_EXPERTS if has_experts else None,
        modules_to_save=["companions"] if has_experts else None,
    )
    return get_peft_model(model, config)
