"""The mathematics of a Mixture-of-Tokens (MoT) layer: the controller and the three mixing modes.

Axes: B rows, T columns, G group size, A = B / G groups of rows, N = A * T groups of tokens, S = B * T tokens,
E experts, K experts per token, D model width, P spans of positions.

A layer calls its experts in two ways: `experts(slab)` runs every expert on its own row of a slab [E, N, D];
`experts(tokens, index, weights)` runs selected experts, the signature of transformers' experts interface.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import log
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.generic import maybe_autocast
from transformers.utils.import_utils import is_tracing

from .companions_mot import NUM_SPANS, GroupMeans, Groups, TypicalGroup, average_groups, cut_rows, form_groups
from .configuration_mot import MixingMode, MoTConfig

MIXING_MODES: tuple[str, ...] = get_args(MixingMode)

Experts = Callable[..., Tensor]


@dataclass
class MixingContext:
    """What one forward pass of the model tells its MoT layers, and what they tell it.

    Deliberately no tuple, dict or other container that wrappers of a module's forward (FSDP, accelerate) would copy
    or cast.

    Args:
        mode (`str`):
            Mixing mode of this pass.
        spans (`torch.Tensor` of shape `[B, T]`):
            Span of positions of every token, see [`find_spans`].
        token_mask (`torch.Tensor` of shape `[B, T]`, *optional*):
            `True` for tokens, `False` for padding. `None` if there is no padding.
        groups (`Groups`, *optional*):
            How the tokens form groups; formed by each layer where it is `None`.
        companions (`dict[int, TypicalGroup]`):
            Per layer, copies of the expected companions for a pass that learns. What is recomputed under gradient
            checkpointing must see what the pass saw, after the running values have moved on.
        means (`dict[int, GroupMeans]`, *optional*):
            Per layer, what the statistics of this batch need, left there by the layer. `None` once they were gathered,
            so that recomputation leaves nothing.
    """

    mode: str
    spans: Tensor
    token_mask: Tensor | None = None
    groups: Groups | None = None
    companions: dict[int, TypicalGroup] = field(default_factory=dict)
    means: dict[int, GroupMeans] | None = field(default_factory=dict)

    def get_groups(self, group_size: int, device: torch.device) -> Groups:
        """The groups, on a layer's device."""
        groups = self.groups or form_groups(self.spans, self.token_mask, group_size)
        return groups if groups.spans.device == device else groups.to(device)

    def average(self, layer_idx: int, group_size: int) -> tuple[TypicalGroup, Tensor]:
        """The statistics of this batch in one layer, and its numbers of tokens `[1 + P]`: of all, and by span."""
        means = self.means[layer_idx]
        groups = self.get_groups(group_size, means.mean_input.device)
        return average_groups([means], groups, group_size)[0], groups.num_tokens


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
        with maybe_autocast(device_type=tokens.device.type, enabled=False):
            return F.linear(tokens.float(), self.weight.float())  # [S, E]


def mix_across_examples(
    hidden_states: Tensor, logits: Tensor, groups: Groups, companions: TypicalGroup, group_size: int, experts: Experts
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mode `cross_example`: every expert gets one mixture of the G tokens of a group, and all get its output back.

    The paper's layer (section 3), in which a group's absent tokens are replaced by expected companions.

    Args:
        hidden_states (`torch.Tensor` of shape `[B, T, D]`): The tokens.
        logits (`torch.Tensor` of shape `[B, T, E]`): The controller's logits, float32.
        groups (`Groups`): The groups that the tokens form.
        companions (`TypicalGroup`): The expected companions.
        group_size (`int`): Rows G of a group; the last group is short where G does not divide B.
        experts (`Callable`): The experts, called on a slab.

    Returns:
        `tuple(torch.Tensor)`: The output `[B, T, D]`, 0 for padding; and of every group the log mass `[N, E]`, the
        mixtures and the experts' outputs `[E, N, D]`.
    """
    num_rows, num_columns = hidden_states.shape[:2]
    x, l = cut_rows(hidden_states, group_size), cut_rows(logits, group_size)  # [A, G, T, D], [A, G, T, E]
    if groups.present is None:
        z = l.logsumexp(dim=1)  # [A, T, E]
    else:
        x, l = x.masked_fill(~groups.present, 0), l.masked_fill(~groups.present, -torch.inf)
        a = groups.log_absent + companions.log_mass  # [A, T, E]
        z = torch.cat([l, a[:, None]], dim=1).logsumexp(dim=1)  # [A, T, E]

    # The groups of tokens in one axis, copied where A > 1: `torch.matmul` would copy the weights for each product.
    w = (l - z[:, None]).exp().to(x.dtype).transpose(1, 2).flatten(0, 1)  # [N, G, E]
    mixture = w.mT @ x.transpose(1, 2).flatten(0, 1)  # [N, E, D]
    if groups.present is not None:
        w_absent = (a - z).exp().flatten(0, 1)[..., None]  # [N, E, 1]
        expected_input = companions.mean_input + companions.input_shift[groups.spans][:, None]  # [N, E, D]
        mixture = (mixture + w_absent * expected_input).to(mixture.dtype)

    slab = mixture.transpose(0, 1)  # [E, N, D]
    y = experts(slab)  # [E, N, D]
    output = (w @ y.transpose(0, 1)).unflatten(0, (-1, num_columns))  # [A, T, G, D]
    output = output.transpose(1, 2).flatten(0, 1)  # [A * G, T, D]
    if len(output) > num_rows:  # or the backward pass would copy the gradient for nothing
        output = output[:num_rows]  # [B, T, D]
    return output, z.flatten(0, 1), slab, y


def mix_with_expected_companions(
    tokens: Tensor,
    logits: Tensor,
    spans: Tensor,
    companions: TypicalGroup,
    group_size: int,
    num_experts_per_tok: int,
    experts: Experts,
) -> Tensor:
    """Mode `per_sequence`: every token is a group of one with G - 1 expected companions.

    Only the K experts on which the token weighs most are run, the others contribute their mean output. Nothing but
    the token itself enters its result.

    Args:
        tokens (`torch.Tensor` of shape `[S, D]`): The tokens.
        logits (`torch.Tensor` of shape `[S, E]`): The controller's logits, float32.
        spans (`torch.Tensor` of shape `[S]`): Span of positions of every token.
        companions (`TypicalGroup`): The expected companions.
        group_size (`int`): Rows G of a group in training.
        num_experts_per_tok (`int`): Number K of experts run for one token.
        experts (`Callable`): The experts, called on selected ones.

    Returns:
        `torch.Tensor` of shape `[S, D]`: The output.
    """
    score = logits - (companions.log_mass + log(group_size - 1))  # [S, E], log odds against the companions
    weights = score.sigmoid()  # [S, E]
    # By score, not by weight: large weights all round to 1, and ties are broken differently from batch to batch.
    index = score.topk(num_experts_per_tok, dim=-1).indices  # [S, K]
    w = weights.gather(-1, index)  # [S, K]

    # In place: fresh memory for S * K vectors is a good part of the cost of a long prompt on a CPU.
    mixture = companions.mean_input[index].add_(companions.input_shift[spans][:, None])  # [S, K, D]
    mixture = mixture.lerp_(tokens[:, None].float(), w[..., None]).to(tokens.dtype).flatten(0, 1)  # [S * K, D]
    run = experts(mixture, index.reshape(-1, 1), w.reshape(-1, 1)).unflatten(0, index.shape).sum(dim=1)  # [S, D]
    others = weights.scatter(-1, index, 0)  # [S, E]
    constant = others @ companions.mean_output  # [S, D]
    constant = constant + others.sum(-1, keepdim=True) * companions.output_shift[spans]  # [S, D]
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
        experts (`Callable`): The experts, called on selected ones.

    Returns:
        `torch.Tensor` of shape `[S, D]`: The output.
    """
    weights, index = logits.softmax(dim=-1).topk(num_experts_per_tok, dim=-1)  # [S, K]
    if norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return experts(tokens, index, weights)


def find_spans(
    inputs_embeds: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None, num_cached: int
) -> Tensor:
    """The spans `[B, T]` that this call's tokens lie in, by their positions among the tokens of their sequence."""
    num_rows, num_columns = inputs_embeds.shape[:2]
    if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
        position_ids = attention_mask.long().cumsum(dim=1)[:, -num_columns:] - 1  # padding on the left does not count
    elif position_ids is None:
        position_ids = torch.arange(num_columns, device=inputs_embeds.device)[None] + num_cached
    starts = 2 ** torch.arange(1, NUM_SPANS, device=position_ids.device) - 1  # [P - 1], of all spans but the first
    return (position_ids[..., None] >= starts).sum(-1).expand(num_rows, -1)


def find_padding(inputs_embeds: Tensor, attention_mask: Tensor | None, token_mask: Tensor | None) -> Tensor | None:
    """The mask `[B, T]` of this call's tokens, or `None` where it is known that there is no padding."""
    if token_mask is None and attention_mask is not None and attention_mask.ndim == 2:
        token_mask = attention_mask[:, -inputs_embeds.shape[1] :]
    if token_mask is None:
        return None
    token_mask = token_mask.to(inputs_embeds.device, torch.bool)
    # One look at the data for the whole model, as transformers does for attention, saves every layer the masked path.
    return None if not is_tracing(token_mask) and token_mask.all() else token_mask


def refuse_flattened_rows(
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past_key_values: object | None,
    kwargs: dict[str, object],
) -> None:
    """Raise for a batch of one row that holds several sequences: it has no other examples to mix with."""
    if inputs_embeds.shape[0] > 1:
        return
    flattened = any(kwargs.get(name) is not None for name in ("cu_seq_lens_q", "cu_seq_lens_k"))
    # As transformers does, positions are looked at only where nothing else says how sequences lie in the row.
    if not flattened and attention_mask is None and past_key_values is None and position_ids is not None:
        flattened = not is_tracing(position_ids) and bool((position_ids.diff(dim=-1) != 1).any())
    if flattened:
        raise ValueError(
            "mixing='cross_example' mixes different rows of the batch, and this batch is one row that holds several "
            "sequences (flattened, packed or continuously batched). Give one sequence a row, or set "
            "mixing='per_sequence' or 'moe'."
        )
