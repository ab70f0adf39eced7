"""The mathematics of a Mixture-of-Tokens (MoT) layer: the controller and the three mixing modes.

Axes: B rows, T columns, G group size, A = B / G groups of rows, N = A * T groups of tokens, S = B * T tokens,
E experts, K experts per token, D model width, P position buckets.

A layer calls its experts in three ways. `experts(x, mixing_weights=weights)` mixes tokens for every expert, runs all
of them and hands their outputs back, see [`mix_and_run`]. `experts(tokens, index, weights)` runs selected experts, by
the signature of transformers' experts interface. With `own=mixtures` they run on mixtures of the tokens, see
[`mix_and_run_selected`].
"""

from collections.abc import Callable
from math import log
from typing import Any, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.generic import maybe_autocast

from .autograd_mot import is_transformed
from .companions_mot import (
    NUM_POSITION_BUCKETS,
    Groups,
    GroupSums,
    RunningStatistics,
    average_groups,
    cut_rows,
    form_groups,
)
from .configuration_mot import MixingMode, MoTConfig
from .masks_mot import find_padding, is_of_tokens, select_columns
from .products_mot import has_wide_products
from .selected_mot import OwnMixtures

MIXING_MODES: tuple[str, ...] = get_args(MixingMode)

Experts = Callable[..., Any]


class MixingContext:
    """What the model passes to its MoT layers in one forward pass, and what they pass back.

    Not a dataclass, tuple, dict or other container: wrappers of a module's forward (FSDP, accelerate) would copy it,
    so that what layers leave in it were lost, and cast its tensors.

    Args:
        mode (`str`):
            Mixing mode of this pass.
        buckets (`torch.Tensor` of shape `[B, T]`):
            Position bucket of every token, see [`find_position_buckets`].
        token_mask (`torch.Tensor` of shape `[B, T]`, *optional*):
            `True` for tokens, `False` for padding. `None` if there is no padding, or nobody asked yet.
        gathers (`bool`, *optional*, defaults to `True`):
            Whether statistics of this batch are gathered.

    Attributes:
        masks (`tuple`, *optional*):
            Arguments of [`find_padding`] that [`~MixingContext.find_tokens`] calls: in modes that mix no rows, only
            those who watch a training need to know which tokens are padding.
        groups (`Groups`, *optional*):
            How the tokens form groups. If `None`, each layer forms them itself.
        companions (`dict[int, RunningStatistics]`):
            Copies of each layer's expected companions, for a pass with gradients. Recomputation under gradient
            checkpointing must see the same values as the pass did, although the running ones have changed since.
        sums (`dict[int, GroupSums]`, *optional*):
            What each layer leaves here for the statistics of this batch. `None` if none are gathered, and once they
            have been, so that recomputation adds nothing.
    """

    def __init__(self, mode: str, buckets: Tensor, token_mask: Tensor | None = None, *, gathers: bool = True) -> None:
        self.mode, self.buckets, self.token_mask = mode, buckets, token_mask
        self.masks: tuple[Tensor, Tensor | None] | None = None
        self.groups: Groups | None = None
        self.companions: dict[int, RunningStatistics] = {}
        self.sums: dict[int, GroupSums] | None = {} if gathers else None

    def find_tokens(self) -> Tensor | None:
        """The mask `[B, T]` of the tokens, or `None` if there is no padding."""
        if self.masks is not None:
            self.token_mask, self.masks = find_padding(*self.masks), None
        return self.token_mask

    def get_groups(self, group_size: int, device: torch.device) -> Groups:
        """The groups, on a layer's device."""
        groups = self.groups or form_groups(self.buckets, self.token_mask, group_size)
        # With a `device_map`, layers of one model are on different devices.
        return groups if groups.buckets.device == device else groups.to(device)

    def average(self, layer_idx: int, group_size: int) -> tuple[RunningStatistics, Tensor]:
        """The statistics of this batch in one layer, and its numbers of tokens `[1 + P]`: in all, and by bucket."""
        sums = cast(dict[int, GroupSums], self.sums)[layer_idx]
        groups = self.get_groups(group_size, sums.sums.device)
        return average_groups([sums], groups, group_size)[0], groups.num_tokens


class MoTRouter(nn.Module):
    """The controller: one logit per expert for every token, in float32 whatever the model's dtype.

    The paper's controller (section 3, logits x . c without bias), under the name and shape of Qwen3-MoE's router.
    """

    def __init__(self, config: MoTConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map tokens `[B, T, D]` to logits `[S, E]`."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # [S, D]
        # In bfloat16, logits from 8 to 16 are rounded to steps of 1/16, which changes weights by up to 3 %. Autocast
        # would do the same to a product of float32.
        with maybe_autocast(device_type=tokens.device.type, enabled=False):
            if _has_mixed_product(tokens, self.weight):
                return _MixedLinear.apply(tokens, self.weight)  # [S, E]
            return F.linear(tokens.float(), self.weight.float())  # [S, E]


def _has_mixed_product(tokens: Tensor, weight: Tensor) -> bool:
    """Whether the device multiplies these in their own dtype into float32."""
    return has_wide_products(tokens) and tokens.dtype == weight.dtype and not is_transformed(tokens, weight)


class _MixedLinear(torch.autograd.Function):
    """Tokens `[S, D]` of half precision times weights `[E, D]` in float32, at the speed of half precision.

    Products of half precision are exact in float32, so that the result is that of factors cast to float32, of which a
    GPU computes products more slowly.
    """

    @staticmethod
    def forward(tokens: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(tokens, weight.T, out_dtype=torch.float32)  # [S, E]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight = ctx.saved_tensors
        grad = grads[0].to(tokens.dtype)  # [S, E]
        return (
            grad @ weight if ctx.needs_input_grad[0] else None,  # [S, D]
            grad.T @ tokens if ctx.needs_input_grad[1] else None,  # [E, D]
        )


def mix_across_examples(
    hidden_states: Tensor,
    logits: Tensor,
    groups: Groups,
    companions: RunningStatistics,
    group_size: int,
    experts: Experts,
    gathers: bool,
    norm_mixing_weights: bool,
) -> tuple[Tensor, GroupSums | None]:
    """Mode `cross_example`: every expert runs on one mixture of a group's G tokens, and all of them share its output.

    This is the paper's layer (section 3), except that expected companions take the place of absent tokens.

    Args:
        hidden_states (`torch.Tensor` of shape `[B, T, D]`): The tokens.
        logits (`torch.Tensor` of shape `[B, T, E]`): The controller's logits, float32.
        groups (`Groups`): The groups that the tokens form.
        companions (`RunningStatistics`): The expected companions.
        group_size (`int`): Rows G of a group; the last group is short where G does not divide B.
        experts (`Callable`): The experts, called on all groups.
        gathers (`bool`): Whether to return what the statistics of this batch need.
        norm_mixing_weights (`bool`):
            Whether the weights by which a token gets the outputs of all E experts back are divided by their sum.

    Returns:
        `tuple(torch.Tensor, GroupSums)`: The output `[B, T, D]`, 0 for padding, and what the statistics need.

    Raises:
        ValueError: Weights shall be normalised in float16.
    """
    if norm_mixing_weights:
        _refuse_float16(hidden_states)
    x, l = cut_rows(hidden_states, group_size), cut_rows(logits, group_size)  # [A, G, T, D], [A, G, T, E]
    options: dict[str, Tensor] = {"counts": groups.counts} if gathers else {}
    if groups.present is not None:  # full groups have no absent companions: nothing to mask, and no copies
        x, l = _add_expected_companions(x, l, groups, companions)  # [A, G + 1, T, D], [A, G + 1, T, E]
        options["mean_input"] = companions.mean_input
    # Rounded to the model's dtype only here: of rounded logits, the weights would not sum to 1.
    w = l.softmax(dim=1)  # [A, H, T, E]
    mixed = experts(x, mixing_weights=w.to(x.dtype), **options)
    output = mixed.output  # [A, G, T, D]
    if norm_mixing_weights:
        total = w[:, :group_size].sum(dim=-1, keepdim=True)  # [A, G, T, 1], 0 for padding
        output = (output / total.clamp(min=1e-12)).to(output.dtype)  # the square of a smaller one would be 0
    output = output.flatten(0, 1)  # [A * G, T, D]
    # Only if there are rows to drop: the derivative of a slice is a copy of the gradient.
    if len(output) > len(hidden_states):
        output = output[: len(hidden_states)]  # [B, T, D]
    if not gathers:
        return output, None
    # The log mass is the largest logit minus the logarithm of its weight. A logsumexp would make two copies of `l`.
    largest = (value.detach().amax(dim=1).flatten(0, 1) for value in (l, w))  # [N, E]
    return output, GroupSums(*largest, mixed.sums, mixed.bucket_sums)


def _refuse_float16(hidden_states: Tensor) -> None:
    """Raise if a layer would divide weights that float16 has rounded to a few bits, or to 0, by their sum."""
    device, dtype = hidden_states.device.type, hidden_states.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if dtype == torch.float16:
        raise ValueError(
            "norm_mixing_weights=True divides mixing weights by their sum, and float16 holds small ones with few bits "
            "or not at all: use bfloat16 or float32, or mixing='per_sequence'."
        )


def _add_expected_companions(
    x: Tensor, l: Tensor, groups: Groups, companions: RunningStatistics
) -> tuple[Tensor, Tensor]:
    """Tokens and logits of the groups, with one row more for all of a group's absent tokens.

    The row holds what every expert expects of them. What each expects beyond that, `companions.mean_input`, is left to
    [`mix_and_run`].
    """
    present = cast(Tensor, groups.present)  # [A, G, T, 1]
    # The tokens too, since 0 times a NaN in padding is NaN.
    x, l = x.masked_fill(~present, 0), l.masked_fill(~present, -torch.inf)
    # Masses stay logarithms: `exp` overflows float32 at 89. In a column of nothing but padding every l is -inf; `a`
    # keeps the softmax finite there.
    a = cast(Tensor, groups.log_absent) + companions.log_mass  # [A, T, E]
    shift = companions.input_shift[groups.buckets].to(x.dtype).unflatten(0, (len(x), -1))  # [A, T, D]
    return torch.cat([x, shift[:, None]], dim=1), torch.cat([l, a[:, None]], dim=1)


@torch.no_grad()
def gather_from_rows(
    hidden_states: Tensor,
    logits: Tensor,
    groups: Groups,
    companions: RunningStatistics,
    group_size: int,
    experts: Experts | None,
) -> GroupSums:
    """What the statistics of a batch need in mode `per_sequence`, in which no group is mixed.

    Log masses and mean mixtures are those that mode `cross_example` has of the same tokens, summed without making the
    mixtures `[E, N, D]`. An expert that is not run for a token stands for a mixture in which the token's weight is
    small. The limit of its output is the output for the expected mixture, which takes the place of the mean output.
    Its shifts by position keep their running values: they would take P times as many runs.

    Args:
        hidden_states (`torch.Tensor` of shape `[B, T, D]`): The tokens.
        logits (`torch.Tensor` of shape `[B, T, E]`): The controller's logits, float32.
        groups (`Groups`): The groups that the tokens would form.
        companions (`RunningStatistics`): The expected companions.
        group_size (`int`): Rows G of a group; the last group is short where G does not divide B.
        experts (`Callable`, *optional*):
            The experts, each of which is called for one mixture. If `None`, mean outputs keep their running values.

    Returns:
        `GroupSums`: What the statistics need.
    """
    x, l = cut_rows(hidden_states, group_size), cut_rows(logits, group_size)  # [A, G, T, D], [A, G, T, E]
    if groups.present is not None:
        x, l = _add_expected_companions(x, l, groups, companions)  # [A, G + 1, T, D], [A, G + 1, T, E]
    w, x = l.softmax(dim=1), x.float()  # [A, H, T, E], [A, H, T, D]
    largest = (value.amax(dim=1).flatten(0, 1) for value in (l, w))  # [N, E]
    num_tokens, num_experts = groups.num_tokens, l.shape[-1]
    with maybe_autocast(device_type=x.device.type, enabled=False):
        weighted = w * groups.counts[0].view(len(x), 1, -1, 1)  # [A, H, T, E]
        inputs = weighted.flatten(0, 2).T @ x.flatten(0, 2)  # [E, D]
        of_groups = (w.sum(dim=-1, keepdim=True) * x).sum(dim=1).flatten(0, 1)  # [N, D], summed over experts
        if groups.present is not None:  # what every expert expects beyond the row that stands for all absent tokens
            absent = w[:, -1].flatten(0, 1)  # [N, E]
            inputs = inputs + (groups.counts[0] @ absent)[:, None] * companions.mean_input
            of_groups = of_groups + absent @ companions.mean_input
        bucket_inputs = groups.counts[1:] @ of_groups  # [P, D]
    mean_output = companions.mean_output  # [E, D]
    if experts is not None:
        mean_input = (inputs / num_tokens[0].clamp(min=1)).to(hidden_states.dtype)  # [E, D]
        index = torch.arange(num_experts, device=x.device)[:, None]  # [E, 1]
        mean_output = experts(mean_input, index, torch.ones_like(index, dtype=w.dtype)).float()  # [E, D]
    bucket_outputs = (mean_output.mean(dim=0) + companions.output_shift) * (num_experts * num_tokens[1:, None])
    sums = torch.stack([inputs, mean_output * num_tokens[0]])  # [2, E, D]
    return GroupSums(*largest, sums, torch.stack([bucket_inputs, bucket_outputs]))


def mix_with_expected_companions(
    tokens: Tensor,
    logits: Tensor,
    buckets: Tensor,
    companions: RunningStatistics,
    group_size: int,
    num_experts_per_tok: int,
    experts: Experts,
    norm_mixing_weights: bool,
) -> Tensor:
    """Mode `per_sequence`: every token is a group of one with G - 1 expected companions.

    Only the K experts in which the token has the largest weights are run; the others contribute their mean output, or
    nothing if weights are normalised. A token's result depends on nothing but the token itself.

    Args:
        tokens (`torch.Tensor` of shape `[S, D]`): The tokens.
        logits (`torch.Tensor` of shape `[S, E]`): The controller's logits, float32.
        buckets (`torch.Tensor` of shape `[S]`): Position bucket of every token.
        companions (`RunningStatistics`): The expected companions.
        group_size (`int`): Rows G of a group in training.
        num_experts_per_tok (`int`): Number K of experts run for one token.
        experts (`Callable`): The experts, of which selected ones are called, on mixtures of their own.
        norm_mixing_weights (`bool`):
            Whether the weights of the K experts' outputs are divided by their sum. Mixtures keep their weights.

    Returns:
        `torch.Tensor` of shape `[S, D]`: The output.
    """
    # A softmax of two, the token and its companions, is the sigmoid of the difference, which cannot overflow.
    score = logits - (companions.log_mass + log(group_size - 1))  # [S, E], log odds against the companions
    weights = score.sigmoid()  # [S, E]
    # By score, not by weight: large weights all round to 1, and how ties are broken depends on the batch.
    index = score.topk(num_experts_per_tok, dim=-1).indices  # [S, K]
    w = weights.gather(-1, index)  # [S, K]
    # Of their logarithms, because all K weights may round to 0.
    shares = F.logsigmoid(score.gather(-1, index)).softmax(dim=-1) if norm_mixing_weights else w  # [S, K]

    own = OwnMixtures(w, buckets, companions.mean_input, companions.input_shift)
    run = experts(tokens, index, shares, own=own)  # [S, D]
    if norm_mixing_weights:
        return run
    # Mean outputs need no look at the others' weights, which decoding could not afford.
    others = weights.scatter(-1, index, 0)  # [S, E]
    constant = others @ companions.mean_output  # [S, D]
    constant = constant + others.sum(-1, keepdim=True) * companions.output_shift[buckets]  # [S, D]
    return run + constant.to(run.dtype)


def route_tokens(
    tokens: Tensor, logits: Tensor, num_experts_per_tok: int, norm_topk_prob: bool, experts: Experts
) -> Tensor:
    """Mode `moe`: token choice as in Qwen3-MoE, with the same parameters.

    Args:
        tokens (`torch.Tensor` of shape `[S, D]`): The tokens.
        logits (`torch.Tensor` of shape `[S, E]`): The controller's logits, float32.
        num_experts_per_tok (`int`): Number K of experts that a token is sent to.
        norm_topk_prob (`bool`): Whether the K weights are renormalised to sum to 1.
        experts (`Callable`): The experts, of which selected ones are called.

    Returns:
        `torch.Tensor` of shape `[S, D]`: The output.
    """
    # Softmax before the choice, as in Qwen3-MoE: an exported model must give the same results.
    weights, index = logits.softmax(dim=-1).topk(num_experts_per_tok, dim=-1)  # [S, K]
    if norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return experts(tokens, index, weights)


def find_position_buckets(
    inputs_embeds: Tensor,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    num_cached: int | Tensor,
    token_mask: Tensor | None = None,
) -> Tensor:
    """The position buckets `[B, T]` of this call's tokens, by their positions in their own sequence."""
    num_rows, num_columns = inputs_embeds.shape[:2]
    # Padding on the left does not count: it must not change a row's results.
    if position_ids is None and is_of_tokens(attention_mask):
        columns = attention_mask.bool().cumsum(dim=1) - 1
        position_ids = select_columns(columns, num_columns, num_cached)  # [B, T]
    elif position_ids is None and token_mask is not None:
        position_ids = token_mask.bool().cumsum(dim=1) - 1 + num_cached  # [B, T]
    elif position_ids is None:
        position_ids = torch.arange(num_columns, device=inputs_embeds.device)[None] + num_cached
    later_buckets = torch.arange(1, NUM_POSITION_BUCKETS, device=position_ids.device)  # [P - 1]
    starts = 2**later_buckets - 1  # [P - 1]
    return (position_ids[..., None] >= starts).sum(-1).expand(num_rows, -1)
