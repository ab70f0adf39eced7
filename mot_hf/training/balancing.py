"""Balanced experts in mode `per_sequence`, without a loss for it.

Axes: B rows, T columns, S = B * T tokens, E experts, K experts per token.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mot_hf.modeling import MoTModel
from mot_hf.modeling.configuration_mot import find_layers
from mot_hf.modeling.mixing_mot import MixingContext, MoTRouter
from mot_hf.modeling.modeling_mot import MoTSparseBlock
from mot_hf.training.monitor import count_choices


class ThresholdBalancing(TrainerCallback):
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
        ValueError: `rate` is not positive, the trainer's model has no MoT layers, or its thresholds are running
            statistics (`config.live_companions`), which would undo what this does.
    """

    def __init__(self, trainer: Trainer, rate: float = 0.01) -> None:
        backbones = [module for module in cast(nn.Module, trainer.model).modules() if isinstance(module, MoTModel)]
        if not rate > 0:
            raise ValueError(f"`balance_rate={rate}` must be greater than 0; leave it out to balance nothing.")
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
        self.rate = rate
        self.loads: dict[int, Tensor] = {}
        self.contexts: dict[int, MixingContext] = {}
        self.hooks: list[Any] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Hook into the MoT layers."""
        self._unhook()
        self.layers = {module.layer_idx: module for module in model.modules() if isinstance(module, MoTSparseBlock)}
        for layer in self.layers.values():
            self.hooks.append(layer.register_forward_pre_hook(self._keep_context))
            self.hooks.append(layer.gate.register_forward_hook(self._make_counter(layer)))

    @torch.no_grad()
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the thresholds."""
        if not self.loads:
            return
        indices = sorted(self.loads)
        loads = cast(Tensor, reduce(torch.stack([self.loads[index] for index in indices]), "sum"))  # [L, E]
        self.loads.clear()
        changes = self.rate * (loads - loads.mean(dim=1, keepdim=True)).sign()
        for index, change in zip(indices, changes, strict=True):
            companions = self.layers[index].companions
            companions.log_mass.copy_(companions.expected().log_mass + change)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the hooks from the model."""
        self._unhook()

    def _unhook(self) -> None:
        while self.hooks:
            self.hooks.pop().remove()

    def _keep_context(self, layer: MoTSparseBlock, inputs: tuple[Tensor, MixingContext]) -> None:
        if layer.training and inputs[1].mode == "per_sequence":
            self.contexts[layer.layer_idx] = inputs[1]

    def _make_counter(self, layer: MoTSparseBlock) -> Callable[[MoTRouter, tuple[Tensor], Tensor], None]:
        index, num_experts_per_tok = layer.layer_idx, cast(int, layer.config.num_experts_per_tok)

        def count(router: MoTRouter, inputs: tuple[Tensor], logits: Tensor) -> None:
            # Gradient checkpointing counts twice, which changes no sign.
            if (context := self.contexts.pop(index, None)) is not None:
                log_mass = layer.find_companions(context).log_mass
                loads = count_choices(logits, context.token_mask, log_mass, num_experts_per_tok)  # [E]
                self.loads[index] = self.loads.get(index, 0) + loads

        return count
