"""Balanced experts in mode `per_sequence`, without a loss for it.

Axes: B rows, T columns, S = B * T tokens, E experts, K experts per token.
"""

from math import inf
from typing import Any, cast

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from mot_hf.modeling import MoTModel
from mot_hf.modeling.configuration_mot import find_layers
from mot_hf.modeling.mixing_mot import MixingContext
from mot_hf.modeling.modeling_mot import MoTSparseBlock
from mot_hf.training.monitor import count_choices
from mot_hf.training.watching import LayerWatch


class ThresholdBalancing(LayerWatch):
    """Lets every expert run for about as many tokens as the others, in training in mode `per_sequence`.

    In this mode a token has a large weight in an expert where its logit exceeds a threshold, the expert's `log_mass`.
    After each step, the thresholds of experts that ran for more tokens than the mean rise by `rate`, and those of the
    others fall. This is the loss-free balancing of arXiv 2408.15664, of a threshold that changes weights as well as
    choices. Thresholds are saved with the model and used at inference. Tokens of all processes and of all
    micro-batches of a step count, padding does not. Steps in other modes change nothing.

    Args:
        trainer (`Trainer`): The trainer: `trainer.add_callback(ThresholdBalancing(trainer))`.
        rate (`float`, *optional*, defaults to 0.01): What a threshold changes by in a step, in units of the logits.

    Raises:
        ValueError: `rate` is not positive and finite, the trainer's model has no MoT layers, or its thresholds are
            running statistics (`config.live_companions`), which would undo what this does.
    """

    def __init__(self, trainer: Trainer, rate: float = 0.01) -> None:
        backbones = [module for module in cast(nn.Module, trainer.model).modules() if isinstance(module, MoTModel)]
        if not 0 < rate < inf:
            raise ValueError(f"`balance_rate={rate}` must be greater than 0 and finite; leave it out.")
        if not backbones or not find_layers(backbones[0].config, "sparse"):
            raise ValueError(
                f"`balance_rate={rate}`, but `trainer.model` ({type(trainer.model).__name__}) has no MoT layers to "
                "balance: `config.mlp_layer_types` needs an entry 'sparse'."
            )
        if backbones[0].config.live_companions:
            raise ValueError(
                f"`balance_rate={rate}` moves thresholds that `live_companions=True` replaces by running averages: "
                "use one of them."
            )
        super().__init__()
        self.rate = rate
        self.loads: dict[tuple[int, torch.device], Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Hook into the MoT layers, and forget a step that an earlier training broke off."""
        super().on_train_begin(args, state, control, model, **kwargs)
        self.loads.clear()

    def wants(self, context: MixingContext) -> bool:
        """Only passes in mode `per_sequence` count."""
        return context.mode == "per_sequence"

    def record(self, layer: MoTSparseBlock, context: MixingContext, tokens: Tensor, logits: Tensor) -> None:
        """Count the tokens of every expert; twice with gradient checkpointing, which changes no sign."""
        log_mass = layer.find_companions(context).log_mass  # [E]
        num_experts_per_tok = cast(int, layer.config.num_experts_per_tok)
        loads = count_choices(logits, context.find_tokens(), log_mass, num_experts_per_tok)  # [E]
        place = (layer.layer_idx, loads.device)
        self.loads[place] = self.loads[place] + loads if place in self.loads else loads

    @torch.no_grad()
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the thresholds."""
        if not self.loads:
            return
        device = next(iter(self.loads.values())).device
        of_layers: dict[int, Tensor] = {}
        for (index, _), loads in sorted(self.loads.items(), key=lambda item: item[0][0]):
            of_layers[index] = of_layers.get(index, 0) + loads.to(device)  # [E]
        self.loads.clear()
        indices = list(of_layers)
        loads = cast(Tensor, reduce(torch.stack(list(of_layers.values())), "sum"))  # [L, E]
        changes = self.rate * (loads - loads.mean(dim=1, keepdim=True)).sign()
        for index, change in zip(indices, changes, strict=True):
            companions = self.layers[index].companions
            log_mass = companions.expected().log_mass  # [E]
            companions.log_mass.copy_(log_mass + change.to(log_mass.device))
