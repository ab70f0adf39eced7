"""What callbacks share that look at the logits of MoT layers while a model is trained."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mot_hf.modeling.mixing_mot import MixingContext
from mot_hf.modeling.modeling_mot import MoTSparseBlock


class LayerWatch(TrainerCallback):
    """Hooks into the MoT layers from the beginning of a training to its end.

    Attributes:
        layers (`dict[int, MoTSparseBlock]`): The MoT layers by their numbers.
    """

    def __init__(self) -> None:
        self.layers: dict[int, MoTSparseBlock] = {}
        # By device too: under `DataParallel`, copies of a layer on several devices run at the same time.
        self._contexts: dict[tuple[int, torch.device], MixingContext] = {}
        self._hooks: list[Any] = []

    def wants(self, context: MixingContext) -> bool:
        """Whether [`record`] is called in this forward pass, which is one of training."""
        raise NotImplementedError

    def record(self, layer: MoTSparseBlock, context: MixingContext, tokens: Tensor, logits: Tensor) -> None:
        """Look at the tokens `[B, T, D]` and the logits `[S, E]` of a layer.

        Gradient checkpointing runs a forward pass a second time, and so does this.
        """
        raise NotImplementedError

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Hook into the MoT layers."""
        self._unhook()
        self.layers = {module.layer_idx: module for module in model.modules() if isinstance(module, MoTSparseBlock)}
        for layer in self.layers.values():
            self._hooks.append(layer.register_forward_pre_hook(self._keep_context))
            self._hooks.append(layer.gate.register_forward_hook(self._make_hook(layer)))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the hooks from the model."""
        self._unhook()

    def _unhook(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _keep_context(self, layer: MoTSparseBlock, inputs: tuple[Tensor, MixingContext]) -> None:
        if layer.training and self.wants(inputs[1]):
            self._contexts[layer.layer_idx, inputs[0].device] = inputs[1]

    def _make_hook(self, layer: MoTSparseBlock) -> Any:
        def hook(router: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> None:
            if (context := self._contexts.pop((layer.layer_idx, inputs[0].device), None)) is not None:
                self.record(layer, context, inputs[0], logits)

        return hook
