"""Exact statistics of the typical group, from a pass over a data set."""

import logging
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, cast

import torch
from accelerate.utils import extract_model_from_parallel, send_to_device
from torch import Tensor, distributed
from tqdm.auto import tqdm

from mot_hf.modeling import MoTModel, MoTPreTrainedModel
from mot_hf.modeling.companions_mot import NUM_POSITION_BUCKETS, RunningStatistics
from mot_hf.modeling.mixing_mot import MixingContext
from mot_hf.modeling.modeling_mot import MoTSparseBlock

logger = logging.getLogger(__name__)

BACKBONE_INPUTS = ("input_ids", "attention_mask", "position_ids", "inputs_embeds", "token_mask")


class GroupTotals:
    """Sums over a data set's groups: every MoT layer's statistics, weighted by tokens, and the number of groups.

    Args:
        layers (`list[MoTSparseBlock]`): The MoT layers.
        group_size (`int`): Rows of a group.
    """

    def __init__(self, layers: list[MoTSparseBlock], group_size: int) -> None:
        self.group_size = group_size
        self.companions = {layer.layer_idx: layer.companions for layer in layers}
        # float64, because float32 sums over a large data set lose the last batches to rounding.
        self.sums = {
            index: [torch.zeros_like(value, dtype=torch.float64) for value in companions.expected()]
            for index, companions in self.companions.items()
        }
        self.num_batches = self.num_groups = self.num_full = self.num_left_out = 0
        self.num_tokens = layers[0].companions.log_mass.new_zeros(NUM_POSITION_BUCKETS, dtype=torch.float64)  # [P]

    def add(self, token_mask: Tensor, context: MixingContext) -> None:
        """Add one pass over tokens `[B, T]`, if its means are finite in all layers."""
        num_present = torch.stack([rows.sum(0) for rows in token_mask.split(self.group_size)])  # [A, T]
        batch = self._sum_up(context) if num_present.any() else {}
        if not all(value.isfinite().all() for sums in batch.values() for value in sums):
            self.num_left_out += 1
            return
        self.num_batches += 1
        self.num_groups += int((num_present > 0).sum())
        self.num_full += int((num_present == self.group_size).sum())
        if not batch:
            return
        for index, sums in batch.items():
            for total, value in zip(self.sums[index], sums, strict=True):
                total.add_(value)
        num_tokens = context.average(next(iter(batch)), self.group_size)[1]  # [1 + P]
        self.num_tokens += num_tokens[1:].double().to(self.num_tokens.device)

    def _sum_up(self, context: MixingContext) -> dict[int, list[Tensor]]:
        """One batch's statistics of every layer, times the number of tokens they are means of."""
        sums = {}
        for index in context.sums or ():
            mean, num_tokens = context.average(index, self.group_size)
            all_tokens, *_ = num_tokens = num_tokens.double()  # [1 + P]
            # Shifts are relative to their own batch's mean, so they cannot be added up over batches.
            input_mean, output_mean = mean.mean_input.mean(0), mean.mean_output.mean(0)  # [D]
            values = mean._replace(
                input_shift=mean.input_shift + input_mean, output_shift=mean.output_shift + output_mean
            )
            by_bucket = num_tokens[1:, None]  # [P, 1]
            weights = RunningStatistics(all_tokens, all_tokens, all_tokens, by_bucket, by_bucket)
            sums[index] = [value * weight for value, weight in zip(values, weights, strict=True)]
        return sums

    def add_up_processes(self) -> None:
        """Replace every sum by the sum over all processes."""
        counts = torch.tensor(
            [self.num_batches, self.num_groups, self.num_full, self.num_left_out], device=self.num_tokens.device
        )
        if distributed.is_available() and distributed.is_initialized():
            for total in (counts, self.num_tokens, *(total for totals in self.sums.values() for total in totals)):
                distributed.all_reduce(total)
        self.num_batches, self.num_groups, self.num_full, self.num_left_out = counts.tolist()

    def write(self) -> None:
        """Replace the layers' running values by the means: in all layers, or in none if interrupted."""
        statistics = {index: self._average(index) for index in self.companions}
        buffers = [buffer for companions in self.companions.values() for buffer in companions.buffers()]
        before = [buffer.clone() for buffer in buffers]
        try:
            for index, companions in self.companions.items():
                num_tokens = self.num_tokens.to(companions.log_mass.device)  # [P]
                companions.replace(statistics[index], num_tokens, self.num_batches)
        except BaseException:
            torch._foreach_copy_(buffers, before)
            raise

    def _average(self, index: int) -> RunningStatistics:
        """The means of one layer."""
        log_mass, mean_input, mean_output, *shifted = self.sums[index]
        num_tokens = self.num_tokens.to(log_mass.device)  # [P]
        means = [total / num_tokens.sum() for total in (log_mass, mean_input, mean_output)]
        shifts = [
            total / num_tokens.clamp(min=1)[:, None] - mean.mean(0)  # [P, D]
            for total, mean in zip(shifted, means[1:], strict=True)
        ]
        return RunningStatistics(*means, *shifts)


@torch.no_grad()
def calibrate(model: MoTPreTrainedModel, batches: Iterable[Mapping[str, Any]], *, show_progress: bool = True) -> int:
    """Replaces the running statistics of the typical group by exact ones over a data set.

    Mode `per_sequence` uses them in place of the other rows of a batch. Training gathers them as it goes. Calibrate a
    model that has none because it was converted rather than trained, that has another tokenizer, or whose weights were
    changed by hand. Do not calibrate a model for text of another domain, for which the statistics of training were
    better where we tried (see docs/concepts/companions.md), nor one that was trained in mode `per_sequence` with
    `config.live_companions=False`, whose weights have got used to its statistics. Compare the loss on other text
    before and after.

    The statistics are those that training gathers: of a model that is trained in mode `per_sequence` with
    `config.live_companions`, those of the groups that its rows would form; of all others, those of mode
    `cross_example`.

    Every group counts by its number of tokens. As in training, a batch whose statistics are not finite (an overflow)
    is left out. With several processes, call this in each one with its share of the batches: all end with the same
    statistics.

    Args:
        model ([`MoTPreTrainedModel`]):
            A MoT model with or without a head, in any dtype, on any device. It may be wrapped for parallel training.
        batches (`Iterable[Mapping[str, Any]]`):
            Batches as a collator makes them: `input_ids` `[B, T]`, and an `attention_mask` if there is padding. B
            should be a multiple of `config.group_size`, and rows of a group should come from different documents.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `int`: Number of batches left out, over all processes.

    Raises:
        ValueError: The model has no MoT layers, or no batch has both tokens and finite statistics. The statistics are
            unchanged.
    """
    model = cast(MoTPreTrainedModel, extract_model_from_parallel(model))
    layers = [module for module in model.modules() if isinstance(module, MoTSparseBlock)]
    if not layers:
        raise ValueError(
            f"`model` ({type(model).__name__}) has no MoT layers to calibrate: "
            "`config.mlp_layer_types` needs an entry 'sparse'."
        )
    totals, passes, was_training = GroupTotals(layers, model.config.group_size), [], model.training
    is_live = model.config.mixing == "per_sequence" and model.config.live_companions
    mode = "per_sequence" if is_live else "cross_example"

    def keep_pass(layer: MoTSparseBlock, inputs: tuple[Tensor, MixingContext], output: Tensor) -> None:
        passes.append(inputs)

    with ExitStack() as stack:
        stack.callback(model.train, was_training)
        stack.callback(layers[0].register_forward_hook(keep_pass).remove)
        backbone = next(module for module in model.eval().modules() if isinstance(module, MoTModel))
        stack.callback(setattr, backbone, "is_calibrated", False)
        backbone.is_calibrated = True
        for batch in tqdm(batches, desc="Calibrating", unit="batch", disable=not show_progress):
            inputs = {name: batch[name] for name in BACKBONE_INPUTS if name in batch}
            backbone(**send_to_device(inputs, backbone.device), mixing=mode, use_cache=False)
            hidden_states, context = passes.pop()
            # The context has no mask where no token is missing.
            everywhere = hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool)
            totals.add(everywhere if context.token_mask is None else context.token_mask, context)

    totals.add_up_processes()
    if totals.num_left_out and not totals.num_tokens.any():
        raise ValueError(
            f"The statistics of all {totals.num_left_out} `batches` with tokens are NaN or infinite: are the model's "
            "weights finite? In float16 they may overflow: load it with `dtype=torch.bfloat16` or `torch.float32`."
        )
    if not totals.num_tokens.any():
        raise ValueError(f"`batches` has no tokens ({totals.num_batches} batches): give at least one batch of text.")
    totals.write()
    is_first = not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
    if is_first and totals.num_left_out:
        logger.warning(
            "%d of %d batches were left out: their statistics are NaN or infinite.",
            totals.num_left_out,
            totals.num_left_out + totals.num_batches,
        )
    if is_first and totals.num_full < 0.5 * totals.num_groups:
        logger.warning(
            "Only %.0f %% of the groups were full (group_size=%d). Expected companions filled the others, so the "
            "statistics depend on the earlier ones: use batches of a multiple of %d rows, with little padding.",
            100 * totals.num_full / totals.num_groups,
            model.config.group_size,
            model.config.group_size,
        )
    return totals.num_left_out
