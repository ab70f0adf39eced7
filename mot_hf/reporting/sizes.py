"""How large a model is."""

from typing import NamedTuple

from mot_hf.modeling import MoTPreTrainedModel
from mot_hf.modeling.modeling_mot import MoTExperts


class ModelSize(NamedTuple):
    """Numbers of parameters of a model.

    Args:
        total (`int`): All parameters; tied ones count once.
        active (`int`): Those that one token uses in modes `per_sequence` and `moe`: all but the experts that are not
            selected. In mode `cross_example` a token's share of the experts' work is `num_experts / group_size`
            experts, the same at the default `num_experts_per_tok`.
    """

    total: int
    active: int


def count_parameters(model: MoTPreTrainedModel) -> ModelSize:
    """Counts the parameters of a MoT model, with or without a head.

    Args:
        model ([`MoTPreTrainedModel`]): The model, on any device, the meta device included.

    Returns:
        [`ModelSize`]: Total and active parameters.
    """
    config = model.config
    total = sum(parameter.numel() for parameter in model.parameters())
    in_experts = sum(
        parameter.numel()
        for module in model.modules()
        if isinstance(module, MoTExperts)
        for parameter in module.parameters()
    )
    idle = in_experts * (config.num_experts - config.num_experts_per_tok) // config.num_experts
    return ModelSize(total, total - idle)
