"""Exact statistics of the typical group, from a pass over a data set."""

import logging
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, send_to_device
from torch import Tensor, distributed
from tqdm.auto import tqdm

from mot_hf.modeling import MoTModel, MoTPreTrainedModel
from mot_hf.modeling.mixing_mot import MixingContext, TypicalGroup
from mot_hf.modeling.modeling_mot import MoTSparseBlock

logger = logging.getLogger(__name__)

BACKBONE_INPUTS = ("input_ids", "attention_mask", "position_ids", "inputs_embeds", "token_mask")


class LayerTotals:
    """Sums over groups of one MoT layer's statistics, each group counted by its number of present tokens.

    Args:
        layer ([`MoTSparseBlock`]): The layer; a forward hook on it adds every pass in mode `cross_example`.
    """

    def __init__(self, layer: MoTSparseBlock) -> None:
        self.layer = layer
        self.num_tokens = torch.zeros((), dtype=torch.float64)
        self.sums = [torch.zeros_like(value, dtype=torch.float64) for value in layer.companions.expected()]

    def add(self, layer: MoTSparseBlock, inputs: tuple[Tensor, MixingContext], output: Tensor) -> None:
        """Add the statistics that the layer left in the context of its pass."""
        hidden_states, context = inputs
        num_tokens = hidden_states.shape[:2].numel() if context.token_mask is None else int(context.token_mask.sum())
        if num_tokens:
            self.num_tokens += num_tokens
            for total, value in zip(self.sums, context.statistics[layer.layer_idx], strict=True):
                total.add_(value, alpha=num_tokens)

    def write(self, num_batches: int) -> None:
        """Add up the totals of all processes, and make their means the layer's running values."""
        num_tokens = _sum_over_processes(self.num_tokens, self.sums[0].device)
        statistics = TypicalGroup(*(_sum_over_processes(total, total.device) / num_tokens for total in self.sums))
        self.layer.companions.replace(statistics, num_batches)


class Fullness:
    """Counts the groups of a data set, and the full ones among them.

    Args:
        group_size (`int`): Rows of a group.
    """

    def __init__(self, group_size: int) -> None:
        self.group_size = group_size
        self.num_groups = 0
        self.num_full = 0

    def add(self, layer: MoTSparseBlock, inputs: tuple[Tensor, MixingContext], output: Tensor) -> None:
        """Count the groups of one pass that hold a token."""
        hidden_states, context = inputs
        token_mask = context.token_mask
        if token_mask is None:
            token_mask = hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool)
        num_present = torch.stack([rows.sum(0) for rows in token_mask.split(self.group_size)])  # [A, T]
        self.num_groups += int((num_present > 0).sum())
        self.num_full += int((num_present == self.group_size).sum())


@torch.no_grad()
def calibrate(model: MoTPreTrainedModel, batches: Iterable[Mapping[str, Any]], *, show_progress: bool = True) -> None:
    """Replaces the running statistics of the typical group by exact ones over a data set.

    Mode `per_sequence` uses them in place of the other rows of a batch. Training gathers them as it goes; calibrate a
    model that was made without training, or for text of another kind. Every group counts by its number of tokens.
    With several processes, call this in each of them with its share of the batches: all end with the same statistics.

    Args:
        model ([`MoTPreTrainedModel`]):
            A MoT model with or without a head, in any dtype, on any device, also wrapped for parallel training.
        batches (`Iterable[Mapping[str, Any]]`):
            Batches as a collator makes them: `input_ids` `[B, T]`, and an `attention_mask` if there is padding. B
            should be a multiple of `config.group_size`, and rows of a group should come from different documents.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Raises:
        ValueError: The model has no MoT layers, or there is no batch with a token. The statistics are unchanged.
    """
    model = extract_model_from_parallel(model)
    layers = [module for module in model.modules() if isinstance(module, MoTSparseBlock)]
    if not layers:
        raise ValueError(
            f"`model` ({type(model).__name__}) has no MoT layers to calibrate: "
            "`config.mlp_layer_types` needs an entry 'sparse'."
        )
    totals, fullness = [LayerTotals(layer) for layer in layers], Fullness(model.config.group_size)
    num_batches, was_training = 0, model.training
    with ExitStack() as stack:
        stack.callback(model.train, was_training)
        for layer, total in zip(layers, totals, strict=True):
            stack.callback(layer.register_forward_hook(total.add).remove)
        stack.callback(layers[0].register_forward_hook(fullness.add).remove)
        backbone = next(module for module in model.eval().modules() if isinstance(module, MoTModel))
        for batch in tqdm(batches, desc="Calibrating", unit="batch", disable=not show_progress):
            inputs = {name: batch[name] for name in BACKBONE_INPUTS if name in batch}
            backbone(**send_to_device(inputs, backbone.device), mixing="cross_example", use_cache=False)
            num_batches += 1

    device = totals[0].sums[0].device
    counts = torch.tensor([num_batches, fullness.num_groups, fullness.num_full], dtype=torch.float64)
    num_batches, num_groups, num_full = map(int, _sum_over_processes(counts, device))
    if not num_groups:
        raise ValueError(f"`batches` holds no token ({num_batches} batches): give at least one batch of text.")
    for total in totals:
        total.write(num_batches)
    if num_full < 0.5 * num_groups:
        logger.warning(
            "Only %.0f %% of the groups were full (group_size=%d). Expected companions filled the others, so the "
            "statistics depend on the earlier ones: use batches of a multiple of %d rows, with little padding.",
            100 * num_full / num_groups,
            model.config.group_size,
            model.config.group_size,
        )


def _sum_over_processes(value: Tensor, device: torch.device) -> Tensor:
    total = value.to(device, copy=True)
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(total)
    return total
