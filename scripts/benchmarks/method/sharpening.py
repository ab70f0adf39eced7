"""Changes to a MoT model that are tried from outside: they sharpen mixing, weaken outputs or balance experts.

Each is a function of a trainer, called before training. Those that change a layer's mixing weights leave the log mass
of a group as it was, so that mode `per_sequence` answers by the same thresholds.

Axes: B rows, T columns, G group size, A = B / G groups of rows, N = A * T groups of tokens, S = B * T tokens,
E experts, D model width.
"""

from collections.abc import Callable, Iterator
from math import log
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from mot_hf.modeling.companions_mot import cut_rows
from mot_hf.modeling.mixing_mot import MixingContext
from mot_hf.modeling.modeling_mot import MoTSparseBlock
from mot_hf.training import ThresholdBalancing

Change = Callable[[Trainer], None]


def find_blocks(trainer: Trainer) -> Iterator[MoTSparseBlock]:
    """The MoT layers of the trainer's model."""
    for module in cast(nn.Module, trainer.model).modules():
        if isinstance(module, MoTSparseBlock):
            yield module


def do_all(*changes: Change) -> Change:
    """Several changes together."""

    def change(trainer: Trainer) -> None:
        for each in changes:
            each(trainer)

    return change


class _EachStep(TrainerCallback):
    """Calls a function with the share of the steps that are done, and the model."""

    def __init__(self, change: Callable[[TrainerState, Any], None]) -> None:
        self.change = change

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Change what changes with the steps."""
        self.change(state, kwargs["model"])


def scale_logits(first: float, last: float) -> Change:
    """All logits are multiplied by a factor that goes from `first` to `last`, linearly with the steps."""

    def change(trainer: Trainer) -> None:
        factor = [first]

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
            return logits * factor[0]

        def set_factor(state: TrainerState, model: Any) -> None:
            factor[0] = first + (last - first) * state.global_step / state.max_steps

        for block in find_blocks(trainer):
            block.gate.register_forward_hook(hook)
        trainer.add_callback(_EachStep(set_factor))

    return change


def scale_outputs(factor: float) -> Change:
    """The outputs of layers with experts are multiplied by a factor."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output * factor

    def change(trainer: Trainer) -> None:
        for module in cast(nn.Module, trainer.model).modules():
            if isinstance(module, (MoTSparseBlock, Qwen3MoeSparseMoeBlock)):
                module.register_forward_hook(hook)

    return change


def take_turns() -> Change:
    """Every second step trains in mode `per_sequence`, the others in mode `cross_example`."""

    def set_mode(state: TrainerState, model: Any) -> None:
        model.set_mixing(("cross_example", "per_sequence")[state.global_step % 2])

    return lambda trainer: trainer.add_callback(_EachStep(set_mode))


def reduce_groups(share: float) -> Change:
    """In training, a share of a layer's groups is reduced to one token each, with its expected companions.

    The rows of a column are reduced together, other columns in every step and layer.
    """

    def forward(self: MoTSparseBlock, hidden_states: Tensor, context: MixingContext) -> Tensor:
        output = MoTSparseBlock.forward(self, hidden_states, context)
        if context.mode != "cross_example" or not self.training:
            return output
        alone = MixingContext("per_sequence", context.buckets, context.token_mask, gathers=False)
        # Copies: the averages change at the end of the pass, before its backward pass.
        alone.companions = {self.layer_idx: self.companions.snapshot()}
        reduced = torch.rand(hidden_states.shape[1], 1, device=hidden_states.device) < share  # [T, 1]
        return torch.where(reduced, MoTSparseBlock.forward(self, hidden_states, alone), output)

    def change(trainer: Trainer) -> None:
        for block in find_blocks(trainer):
            block.forward = MethodType(forward, block)

    return change


def _change_logits_of_groups(change_logits: Callable[[Tensor], Tensor]) -> Change:
    """Mode `cross_example` mixes by changed logits `[A, G, T, E]`, moved back to the same logsumexp over the group."""

    def change(trainer: Trainer) -> None:
        for block in find_blocks(trainer):
            modes: list[str] = []

            def note_mode(module: nn.Module, inputs: tuple[Any, ...], modes: list[str] = modes) -> None:
                modes[:] = [cast(MixingContext, inputs[1]).mode]

            def hook(
                module: nn.Module,
                inputs: tuple[Tensor, ...],
                logits: Tensor,
                modes: list[str] = modes,
                group_size: int = block.config.group_size,
            ) -> Tensor:
                if modes != ["cross_example"]:
                    return logits
                l = cut_rows(logits.unflatten(0, inputs[0].shape[:2]), group_size)  # [A, G, T, E]
                changed = change_logits(l)  # [A, G, T, E]
                changed = changed + (l.logsumexp(dim=1, keepdim=True) - changed.logsumexp(dim=1, keepdim=True))
                return changed.flatten(0, 2)  # [S, E]

            block.register_forward_pre_hook(note_mode)
            block.gate.register_forward_hook(hook)

    return change


def mix_best(number: int) -> Change:
    """Every expert mixes the tokens with the largest logits of a group, and no others."""

    def change_logits(l: Tensor) -> Tensor:
        smallest = l.topk(number, dim=1).values[:, -1:]  # [A, 1, T, E]
        return l.masked_fill(l < smallest, -torch.inf)

    return _change_logits_of_groups(change_logits)


def use_entmax() -> Change:
    """Mixing weights are 1.5-entmax over the group (Peters et al., arXiv 1905.05702) in place of a softmax."""

    def change_logits(l: Tensor) -> Tensor:
        weights = entmax(l)  # [A, G, T, E]
        return weights.clamp(min=torch.finfo(weights.dtype).tiny).log().masked_fill(weights == 0, -torch.inf)

    return _change_logits_of_groups(change_logits)


def entmax(logits: Tensor) -> Tensor:
    """1.5-entmax over the second axis: `max(l / 2 - threshold, 0) ** 2`, with the threshold that makes the sum 1."""
    l = (logits - logits.detach().amax(dim=1, keepdim=True)) / 2
    ordered = l.sort(dim=1, descending=True).values  # [A, G, T, E]
    count = torch.arange(1, l.shape[1] + 1, device=l.device).view(-1, 1, 1)  # [G, 1, 1]
    mean, square = ordered.cumsum(dim=1) / count, ordered.square().cumsum(dim=1) / count
    # For every number of weights that are not 0, the smaller root of its quadratic equation.
    root = ((1 - count * (square - mean.square())) / count).clamp(min=1e-12).sqrt()
    thresholds = mean - root  # [A, G, T, E]
    support = (thresholds <= ordered).sum(dim=1, keepdim=True)  # [A, 1, T, E]
    return (l - thresholds.gather(1, support - 1)).clamp(min=0).square()


def choose_by_experts() -> Change:
    """Every expert runs on its one best token of a group, and hands back by the weight of mode `per_sequence`.

    This is expert choice (Zhou et al., arXiv 2202.09368) among the tokens of a group.
    """

    def forward(self: MoTSparseBlock, hidden_states: Tensor, context: MixingContext) -> Tensor:
        if context.mode != "cross_example":
            return MoTSparseBlock.forward(self, hidden_states, context)
        logits = self.gate(hidden_states)  # [S, E]
        group_size = self.config.group_size
        l = cut_rows(logits.unflatten(0, hidden_states.shape[:2]), group_size).transpose(1, 2)  # [A, T, G, E]
        x = cut_rows(hidden_states, group_size).transpose(1, 2)  # [A, T, G, D]
        largest, best = l.max(dim=2)  # [A, T, E]
        best = best[..., None].expand(*best.shape, x.shape[-1])  # [A, T, E, D]
        rows = x.gather(2, best).flatten(0, 1).transpose(0, 1)  # [E, N, D]
        outputs = cast(Tensor, self.experts(rows)).transpose(0, 1).unflatten(0, x.shape[:2])  # [A, T, E, D]
        companions = self.find_companions(context)
        w = (largest - (companions.log_mass + log(group_size - 1))).sigmoid()  # [A, T, E]
        output = torch.zeros_like(x).scatter_add(2, best, w[..., None] * outputs)  # [A, T, G, D]
        if context.sums is not None:
            context.sums[self.layer_idx] = self._gather_from_rows(hidden_states, logits, context)
        return output.transpose(1, 2).flatten(0, 1)  # [B, T, D]

    def change(trainer: Trainer) -> None:
        for block in find_blocks(trainer):
            block.forward = MethodType(forward, block)

    return change


def balance_thresholds(rate: float) -> Change:
    """Experts are balanced in mode `per_sequence`, by [`ThresholdBalancing`]."""
    return lambda trainer: trainer.add_callback(ThresholdBalancing(trainer, rate))
