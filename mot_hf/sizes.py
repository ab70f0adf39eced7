"""Counts the parameters and FLOPs of a model."""

from typing import Any, NamedTuple, cast

import torch
from torch.utils.flop_counter import FlopCounterMode

from mot_hf.modeling import MoTPreTrainedModel
from mot_hf.modeling.modeling_mot import MoTExperts


def _count_bmm(left: torch.Size, right: torch.Size, *_: Any, **__: Any) -> int:
    """FLOPs of a batch of products `[E, N, I]` times `[E, I, O]`."""
    return 2 * left.numel() * right[-1]


# torch (2.13) raises at a product with `out_dtype`, of which a layer on a GPU makes some.
FLOP_FORMULAS = {torch.ops.aten.bmm: _count_bmm}


class ModelSize(NamedTuple):
    """Numbers of parameters of a model.

    Args:
        total (`int`): All parameters; tied ones are counted once.
        active (`int`): Parameters that one token uses in modes `per_sequence` and `moe`: all except the experts that
            are not selected. In mode `cross_example`, a token's share of the experts' work is
            `num_experts / group_size` experts, which is the same at the default `num_experts_per_tok`.
    """

    total: int
    active: int


def count_parameters(model: MoTPreTrainedModel) -> ModelSize:
    """Counts the parameters of a MoT model, with or without a head.

    Args:
        model ([`MoTPreTrainedModel`]): The model, on any device, including the meta device.

    Returns:
        [`ModelSize`]: Total and active parameters.
    """
    config = model.config
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = count_in_experts(model) * (config.num_experts - cast(int, config.num_experts_per_tok)) // config.num_experts
    return ModelSize(total, total - idle)


def count_in_experts(model: MoTPreTrainedModel) -> int:
    """Counts the parameters of all experts.

    Args:
        model ([`MoTPreTrainedModel`]): The model, on any device, including the meta device.

    Returns:
        `int`: Their number.
    """
    experts = (module for module in model.modules() if isinstance(module, MoTExperts))
    return sum(parameter.numel() for module in experts for parameter in module.parameters())


@torch.no_grad()
def count_flops(model: MoTPreTrainedModel, num_columns: int, mixing: str = "cross_example") -> float:
    """Counts the FLOPs per token of a forward pass. Training takes three times as many.

    Those of the running statistics are among them.

    Args:
        model ([`MoTPreTrainedModel`]): The model, preferably on the meta device, where nothing is computed.
        num_columns (`int`): Number of tokens T in a row, which affects attention.
        mixing (`str`, *optional*, defaults to `"cross_example"`): The mixing mode.

    Returns:
        `float`: Floating-point operations per token; a multiplication and an addition count as two.
    """
    for module in model.modules():
        # Some types read the positions, which have no values on meta; the default type takes as many FLOPs.
        if hasattr(module, "rope_type") and model.device.type == "meta":
            module.rope_type = "default"
    num_rows, device = model.config.group_size, model.device
    ids = torch.zeros(num_rows, num_columns, dtype=torch.long, device=device)
    # A 4-D mask for attention: for other masks transformers would read the data, and on meta there is none.
    mask = torch.zeros(num_rows, 1, num_columns, num_columns, dtype=torch.bool, device=device)
    implementation = model.config._experts_implementation
    # The others look at the choice of experts, or are not counted.
    model.set_experts_implementation("batched_mm")
    try:
        with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
            model(ids, attention_mask=mask, mixing=mixing)
    finally:
        model.set_experts_implementation(implementation)
    return counter.get_total_flops() / ids.numel()
