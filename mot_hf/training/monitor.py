"""Monitoring of the mixing while a MoT model is trained.

Axes: B rows, T columns, A groups of rows, G group size, N = A * T groups of tokens, S = B * T tokens, E experts,
K experts per token, D model width.
"""

from collections import defaultdict
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from mot_hf.modeling.mixing_mot import MixingContext
from mot_hf.modeling.modeling_mot import MoTSparseBlock
from mot_hf.training.watching import LayerWatch

# Groups of tokens to measure, spread over the columns, and ranges of layers to log.
_MAX_GROUPS = 64
_MAX_RANGES = 4


class MixingMonitor(LayerWatch):
    """Logs statistics of the mixing with every training loss, to all trackers of the `Trainer`.

    They are logged for up to four ranges of MoT layers. In mode `cross_example`, as means over groups, experts and
    processes:

    - `mixing/entropy/layers_A-B`: entropy of an expert's mixing weights, divided by log n for a group of n tokens: 1
      if all tokens have the same weight, 0 if an expert receives one token.
    - `mixing/largest_weight/...`: largest mixing weight in a group.
    - `mixing/effective_tokens/...`: 1 / sum of squared weights, the number of tokens that an expert effectively mixes.
    - `mixing/mixture_similarity/...`: mean cosine similarity of the mixtures that two experts receive from the same
      group.
    - `mixing/full_groups`: fraction of groups in which no token is missing.

    In modes `per_sequence` and `moe`, over the tokens of the step in all processes:

    - `mixing/busiest_expert/...`: largest number of tokens that one expert runs for, divided by the experts' mean.
    - `mixing/idle_experts/...`: number of experts that run for no token.

    In all modes but `moe`, in which nothing is expected of companions:

    - `mixing/companion_drift/...`: relative change of the expected mixtures since the last log.

    Weights are taken among the tokens that are present. Only steps that log are measured (with logging strategy
    `"steps"`), in mode `cross_example` with up to 64 groups of each micro-batch.

    Args:
        trainer (`Trainer`): The trainer that logs: `trainer.add_callback(MixingMonitor(trainer))`.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__()
        self.log = trainer.log
        self.is_recording = False
        self.pending: dict[tuple[int, torch.device], dict[str, Tensor]] = {}
        self.totals: dict[int, list[dict[str, Tensor]]] = defaultdict(list)
        self.expected_inputs: dict[int, Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Hook into the MoT layers, and note what they expect now."""
        super().on_train_begin(args, state, control, model, **kwargs)
        for index, layer in self.layers.items():
            self.expected_inputs[index] = layer.companions.mean_input.clone()

    def wants(self, context: MixingContext) -> bool:
        """Only steps that log are measured."""
        return self.is_recording

    def record(self, layer: MoTSparseBlock, context: MixingContext, tokens: Tensor, logits: Tensor) -> None:
        """Measure a pass, but not a second time."""
        place, config = (layer.layer_idx, tokens.device), layer.config
        if place in self.pending:
            return
        if context.mode == "cross_example":
            self.pending[place] = measure_mixing(tokens, logits, context.find_tokens(), config.group_size)
            return
        log_mass = layer.find_companions(context).log_mass if context.mode == "per_sequence" else None
        loads = count_choices(logits, context.find_tokens(), log_mass, cast(int, config.num_experts_per_tok))
        self.pending[place] = {"loads": loads}

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
        for (index, device), values in self.pending.items():
            totals = self.totals[index]
            home = next(iter(totals[0].values())).device if totals else device
            totals.append({name: value.to(home) for name, value in values.items()})
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

    @torch.no_grad()
    def _summarize(self) -> dict[str, float]:
        layers = {index: _join(passes) for index, passes in sorted(self.totals.items())}
        for index, values in layers.items():
            if self.layers[index].config.mixing == "moe":
                continue
            before = self.expected_inputs[index]
            now = cast(Tensor, reduce(self.layers[index].companions.mean_input, "mean"))
            if before.any():  # all zero until the first update
                values["companion_drift"] = (now - before).norm() / before.norm()
            self.expected_inputs[index] = now
        device = next(iter(layers[min(layers)].values())).device  # with a `device_map`, layers are on several
        layers = {index: {key: one.to(device) for key, one in values.items()} for index, values in layers.items()}
        full_groups = [values.pop("full_groups") for values in layers.values() if "full_groups" in values]
        logs = {"mixing/full_groups": torch.stack(full_groups).mean()} if full_groups else {}
        for indices in split_layers(list(layers)):
            name = f"layers_{indices[0]}-{indices[-1]}" if len(indices) > 1 else f"layers_{indices[0]}"
            for key in layers[indices[0]]:
                logs[f"mixing/{key}/{name}"] = torch.stack([layers[index][key].float() for index in indices]).mean()
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


@torch.no_grad()
def count_choices(
    logits: Tensor, token_mask: Tensor | None, log_mass: Tensor | None, num_experts_per_tok: int
) -> Tensor:
    """Counts the tokens that each expert runs for.

    Args:
        logits (`torch.Tensor` of shape `[S, E]`): The controller's logits.
        token_mask (`torch.Tensor` of shape `[B, T]`, *optional*): `False` for padding.
        log_mass (`torch.Tensor` of shape `[E]`, *optional*):
            The companions' log masses in mode `per_sequence`; `None` in mode `moe`.
        num_experts_per_tok (`int`): Number K of experts run for one token.

    Returns:
        `torch.Tensor` of shape `[E]`: The numbers, float32.
    """
    score = logits if log_mass is None else logits - log_mass  # [S, E]
    index = score.topk(num_experts_per_tok, dim=-1).indices  # [S, K]
    counted = torch.ones_like(index) if token_mask is None else token_mask.reshape(-1, 1).expand_as(index)  # [S, K]
    loads = torch.zeros(logits.shape[-1], device=logits.device)  # [E]
    return loads.index_add_(0, index.flatten(), counted.flatten().to(loads.dtype))


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


def _join(passes: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The statistics of a layer over micro-batches, and those of its loads over processes too."""
    values = {key: torch.stack([one[key] for one in passes]) for key in passes[0]}
    if "loads" not in values:
        return {key: each.mean() for key, each in values.items()}
    loads = cast(Tensor, reduce(values["loads"].sum(dim=0), "sum"))  # [E]
    return {"busiest_expert": loads.max() / loads.mean().clamp(min=1e-12), "idle_experts": (loads == 0).sum()}
