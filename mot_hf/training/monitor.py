"""Monitoring of the mixing while a MoT model is trained.

Axes: B rows, T columns, A groups of rows, G group size, N = A * T groups of tokens, E experts, D model width.
"""

from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from mot_hf.modeling.mixing_mot import MixingContext, MoTRouter
from mot_hf.modeling.modeling_mot import MoTSparseBlock

# Groups of tokens to measure, spread over the columns, and ranges of layers to log.
_MAX_GROUPS = 64
_MAX_RANGES = 4


class MixingMonitor(TrainerCallback):
    """Logs statistics of the mixing with every training loss, to all trackers of the `Trainer`.

    They are logged for up to four ranges of MoT layers, as means over groups, experts and processes:

    - `mixing/entropy/layers_A-B`: entropy of an expert's mixing weights, divided by log n for a group of n tokens: 1
      if all tokens have the same weight, 0 if an expert receives one token.
    - `mixing/largest_weight/...`: largest mixing weight in a group.
    - `mixing/effective_tokens/...`: 1 / sum of squared weights, the number of tokens that an expert effectively mixes.
    - `mixing/mixture_similarity/...`: mean cosine similarity of the mixtures that two experts receive from the same
      group.
    - `mixing/companion_drift/...`: relative change of the expected mixtures since the last log.
    - `mixing/full_groups`: fraction of groups in which no token is missing.

    Weights are taken among the tokens that are present. Only steps that log are measured (with logging strategy
    `"steps"`), with up to 64 groups of each micro-batch. In modes other than `cross_example`, nothing is logged.

    Args:
        trainer (`Trainer`): The trainer that logs: `trainer.add_callback(MixingMonitor(trainer))`.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.log = trainer.log
        self.is_recording = False
        self.token_masks: dict[int, Tensor | None] = {}
        self.pending: dict[int, dict[str, Tensor]] = {}
        self.totals: dict[int, list[dict[str, Tensor]]] = defaultdict(list)
        self.expected_inputs: dict[int, Tensor] = {}
        self.hooks: list[Any] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Hook into the MoT layers."""
        self._unhook()
        self.layers = {module.layer_idx: module for module in model.modules() if isinstance(module, MoTSparseBlock)}
        for index, layer in self.layers.items():
            self.expected_inputs[index] = layer.companions.mean_input.clone()
            self.hooks.append(layer.register_forward_pre_hook(self._keep_mask))
            self.hooks.append(layer.gate.register_forward_hook(self._make_recorder(layer)))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start recording if this step will log."""
        step = state.global_step + 1
        by_steps = args.logging_strategy == IntervalStrategy.STEPS and step % max(1, int(state.logging_steps)) == 0
        self.is_recording = by_steps or (step == 1 and args.logging_first_step)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add a micro-batch to the totals once it can no longer be recomputed."""
        for index, values in self.pending.items():
            self.totals[index].append(values)
        self.pending.clear()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop recording."""
        self.on_substep_end(args, state, control)
        self.is_recording = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Log the recorded statistics after the training loss; an earlier log would replace it."""
        if "loss" in logs and self.totals:
            values = self._summarize()
            self.totals.clear()
            self.log(values)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the hooks from the model."""
        self._unhook()

    def _unhook(self) -> None:
        while self.hooks:
            self.hooks.pop().remove()

    def _keep_mask(self, layer: MoTSparseBlock, inputs: tuple[Tensor, MixingContext]) -> None:
        if self.is_recording and layer.training:
            context = inputs[1]
            if context.mode == "cross_example":
                self.token_masks[layer.layer_idx] = context.token_mask

    def _make_recorder(self, layer: MoTSparseBlock) -> Callable[[MoTRouter, tuple[Tensor], Tensor], None]:
        index, group_size = layer.layer_idx, layer.config.group_size

        def record(router: MoTRouter, inputs: tuple[Tensor], logits: Tensor) -> None:
            # Gradient checkpointing runs the forward pass a second time.
            if self.is_recording and index in self.token_masks and index not in self.pending:
                token_mask = self.token_masks.pop(index)
                self.pending[index] = measure_mixing(inputs[0], logits, token_mask, group_size)

        return record

    @torch.no_grad()
    def _summarize(self) -> dict[str, float]:
        layers = {index: _average(passes) for index, passes in sorted(self.totals.items())}
        for index, values in layers.items():
            before = self.expected_inputs[index]
            now = cast(Tensor, reduce(self.layers[index].companions.mean_input, "mean"))
            if before.any():  # all zero until the first update
                values["companion_drift"] = (now - before).norm() / before.norm()
            self.expected_inputs[index] = now
        logs = {"mixing/full_groups": torch.stack([values.pop("full_groups") for values in layers.values()]).mean()}
        for indices in split_layers(list(layers)):
            name = f"layers_{indices[0]}-{indices[-1]}" if len(indices) > 1 else f"layers_{indices[0]}"
            for key in layers[indices[0]]:
                logs[f"mixing/{key}/{name}"] = torch.stack([layers[index][key] for index in indices]).mean()
        means = cast(Tensor, reduce(torch.stack([value.float() for value in logs.values()]), "mean"))
        return dict(zip(logs, means.tolist(), strict=True))


@torch.no_grad()
def measure_mixing(
    hidden_states: Tensor, logits: Tensor, token_mask: Tensor | None, group_size: int
) -> dict[str, Tensor]:
    """Measures the mixing weights and mixtures of some groups of one micro-batch.

    Args:
        hidden_states (`torch.Tensor` of shape `[B, T, D]`): The tokens that a MoT layer mixes.
        logits (`torch.Tensor` of shape `[B * T, E]`): The controller's logits.
        token_mask (`torch.Tensor` of shape `[B, T]`, *optional*): `False` for padding.
        group_size (`int`): Rows G of a group.

    Returns:
        `dict[str, torch.Tensor]`: The scalars `entropy`, `largest_weight`, `effective_tokens`,
        `mixture_similarity` and `full_groups`, as defined in [`MixingMonitor`].
    """
    num_rows, num_columns = hidden_states.shape[:2]
    num_groups = -(-num_rows // group_size)
    stride = -(-num_groups * num_columns // _MAX_GROUPS)
    if token_mask is None:
        token_mask = hidden_states.new_ones(num_rows, num_columns, dtype=torch.bool)
    rows = (hidden_states.float(), logits.unflatten(0, (num_rows, num_columns)).float(), token_mask[..., None])
    x, l, present = (_gather_groups(values[:, ::stride], group_size, num_groups) for values in rows)  # [N, G, ...]
    l = l.masked_fill(~present, torch.finfo(l.dtype).min)
    w = l.softmax(dim=1) * present  # [N, G, E]
    num_present = present.sum(dim=1)  # [N, 1]
    counts, mixed = (num_present[:, 0] > 0), (num_present[:, 0] > 1)  # [N]
    entropy = torch.special.entr(w).sum(dim=1) / num_present.clamp(min=2).log()  # [N, E]
    mixtures = F.normalize(w.transpose(1, 2) @ x.masked_fill(~present, 0), dim=-1)  # [N, E, D]
    num_experts = mixtures.shape[1]
    cosines = mixtures.sum(dim=1).square().sum(dim=-1) - num_experts  # [N], summed over all pairs of different experts
    return {
        "entropy": _mean(entropy.mean(1), mixed),
        "largest_weight": _mean(w.amax(dim=1).mean(1), counts),
        "effective_tokens": _mean((1 / w.square().sum(dim=1).clamp(min=1e-12)).mean(1), counts),
        "mixture_similarity": _mean(cosines / max(1, num_experts * (num_experts - 1)), counts),
        "full_groups": _mean((num_present[:, 0] == group_size).float(), counts),
    }


def split_layers(indices: list[int]) -> list[list[int]]:
    """Splits layers into at most four ranges of nearly equal length."""
    num_ranges = min(_MAX_RANGES, len(indices))
    bounds = [len(indices) * place // num_ranges for place in range(num_ranges + 1)]
    return [indices[start:end] for start, end in pairwise(bounds)]


def _gather_groups(rows: Tensor, group_size: int, num_groups: int) -> Tensor:
    """Split rows `[B, T, ...]` into groups `[A * T, G, ...]`; the last groups are padded with zeros."""
    missing = num_groups * group_size - rows.shape[0]
    rows = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows
    return rows.unflatten(0, (num_groups, group_size)).transpose(1, 2).flatten(0, 1)


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    """Mean over the groups with `counts` true; 0 if there are none."""
    return (values * counts).sum() / counts.sum().clamp(min=1)


def _average(passes: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([values[key] for values in passes]).mean() for key in passes[0]}
