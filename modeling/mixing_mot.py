"""The mathematics of a Mixture-of-Tokens (MoT) layer: controller, companions and the three mixing modes.

Axes: B rows, T columns, G group size, A = B / G groups of rows, N = A * T groups of tokens, S = B * T tokens,
E experts, K experts per token, D model width, P spans of positions.

A layer calls its experts in two ways: `experts(slab)` runs every expert on its own row of a slab [E, N, D];
`experts(tokens, index, weights)` runs selected experts, the signature of transformers' experts interface.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import log
from typing import NamedTuple, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.generic import maybe_autocast
from transformers.utils.import_utils import is_tracing

from .configuration_mot import MixingMode, MoTConfig

MIXING_MODES: tuple[str, ...] = get_args(MixingMode)

# Spans of positions 0, 1-2, 3-6, 7-14, ..., each twice as long as the one before; the last one is open.
NUM_SPANS = 16

Experts = Callable[..., Tensor]


class TypicalGroup(NamedTuple):
    """Statistics of the typical group of tokens, as means over groups; all float32.

    Tokens with little context differ from later ones, and with them what is mixed. How much so is the same for all
    experts to a good approximation, hence the shifts by span of positions, averaged over experts.

    Args:
        log_mass (`torch.Tensor` of shape `[E]`):
            Logsumexp of the group's logits, less log G.
        mean_input (`torch.Tensor` of shape `[E, D]`):
            Mixture that the expert receives.
        mean_output (`torch.Tensor` of shape `[E, D]`):
            What the expert makes of its mixture.
        input_shift (`torch.Tensor` of shape `[P, D]`):
            By how much mixtures of a span differ from `mean_input`.
        output_shift (`torch.Tensor` of shape `[P, D]`):
            By how much the experts' outputs in a span differ from `mean_output`.
    """

    log_mass: Tensor
    mean_input: Tensor
    mean_output: Tensor
    input_shift: Tensor
    output_shift: Tensor


class GroupStatistics(NamedTuple):
    """Statistics of the groups of one micro-batch, in which a group counts by its number of present tokens.

    Args:
        mean ([`TypicalGroup`]):
            The means; the shift of a span without tokens is 0.
        num_tokens (`torch.Tensor` of shape `[P]`):
            Number of present tokens by span.
    """

    mean: TypicalGroup
    num_tokens: Tensor


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
        companions (`dict[int, TypicalGroup]`):
            Per layer, the expected companions of this pass: recomputation under gradient checkpointing must see what
            the pass saw, after the running values have moved on.
        statistics (`dict[int, GroupStatistics]`):
            Per layer, this batch's statistics, left there by the layer.
    """

    mode: str
    spans: Tensor
    token_mask: Tensor | None = None
    companions: dict[int, TypicalGroup] = field(default_factory=dict)
    statistics: dict[int, GroupStatistics] = field(default_factory=dict)


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


class MoTCompanions(nn.Module):
    """Running averages of the typical group, which stand in for a token's absent companions.

    Persistent float32 buffers in a model of any dtype, to MoT what running mean and variance are to batch
    normalisation. While fewer than `1 / companion_momentum` micro-batches have been seen they are plain averages.
    """

    def __init__(self, config: MoTConfig) -> None:
        super().__init__()
        self.config = config
        num_experts, width = config.num_experts, config.hidden_size
        for name, shape in (
            ("log_mass", (num_experts,)),
            ("mean_input", (num_experts, width)),
            ("mean_output", (num_experts, width)),
            ("input_shift", (NUM_SPANS, width)),
            ("output_shift", (NUM_SPANS, width)),
        ):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))
        self.register_buffer("num_span_batches", torch.zeros(NUM_SPANS, dtype=torch.long))

    def expected(self) -> TypicalGroup:
        """The running averages."""
        return TypicalGroup(*(getattr(self, name) for name in TypicalGroup._fields))

    @torch.no_grad()
    def absorb(self, batch: GroupStatistics) -> None:
        """Move the running averages towards the statistics of one micro-batch.

        A batch whose statistics are not finite (no real token, or an overflow) is left out.
        """
        usable = torch.stack([value.isfinite().all() for value in batch.mean]).all()
        in_span = usable & (batch.num_tokens > 0)  # [P]
        # New tensors, not changed ones: the backward pass still needs those that the forward pass saw, and where they
        # are changed in place, compiled code recomputes from the changed ones (torch 2.13) and eager code raises.
        self.num_batches_tracked = self.num_batches_tracked + usable
        self.num_span_batches = self.num_span_batches + in_span
        for name, value in batch.mean._asdict().items():
            of_spans = name in ("input_shift", "output_shift")
            moves = in_span[:, None] if of_spans else usable
            rate = self._rate(self.num_span_batches)[:, None] if of_spans else self._rate(self.num_batches_tracked)
            running = getattr(self, name)
            setattr(self, name, torch.where(moves, torch.lerp(running, value, rate), running))
        self.fill_spans()

    @torch.no_grad()
    def replace(self, statistics: GroupStatistics, num_batches: int) -> None:
        """Set the running averages to statistics that were computed over `num_batches` batches."""
        self.num_batches_tracked = torch.full_like(self.num_batches_tracked, num_batches)
        self.num_span_batches = num_batches * (statistics.num_tokens > 0).to(self.num_span_batches)
        for name, value in statistics.mean._asdict().items():
            setattr(self, name, value.to(getattr(self, name)))
        self.fill_spans()

    def _rate(self, num_batches: Tensor) -> Tensor:
        """Weight of the newest micro-batch where it is the `num_batches`-th."""
        return num_batches.clamp(min=1).float().reciprocal().clamp(min=self.config.companion_momentum)

    def fill_spans(self) -> None:
        """Give spans that were never met the shifts of the nearest lower one that was."""
        spans = torch.arange(NUM_SPANS, device=self.num_span_batches.device)
        met = torch.where(self.num_span_batches > 0, spans, 0)  # [P]
        nearest = met.expand(NUM_SPANS, -1).tril().amax(dim=1)  # [P]
        self.input_shift, self.output_shift = self.input_shift[nearest], self.output_shift[nearest]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Casting a model (`model.to(torch.bfloat16)`, `model.half()`) moves these buffers but keeps their dtype.
        def move(buffer: Tensor) -> Tensor:
            moved = fn(buffer)
            return moved if moved.dtype == buffer.dtype else buffer.to(moved.device)

        return super()._apply(move, recurse)


def mix_across_examples(
    hidden_states: Tensor,
    logits: Tensor,
    spans: Tensor,
    token_mask: Tensor | None,
    companions: TypicalGroup,
    group_size: int,
    experts: Experts,
) -> tuple[Tensor, GroupStatistics]:
    """Mode `cross_example`: every expert gets one mixture of the G tokens of a group, and all get its output back.

    The paper's layer (section 3), in which a group's absent tokens are replaced by expected companions.

    Args:
        hidden_states (`torch.Tensor` of shape `[B, T, D]`): The tokens.
        logits (`torch.Tensor` of shape `[B, T, E]`): The controller's logits, float32.
        spans (`torch.Tensor` of shape `[B, T]`): Span of positions of every token; a group has its latest.
        token_mask (`torch.Tensor` of shape `[B, T]`, *optional*): `False` for padding.
        companions (`TypicalGroup`): The expected companions.
        group_size (`int`): Rows G of a group; the last group is short where G does not divide B.
        experts (`Callable`): The experts, called on a slab.

    Returns:
        `tuple[torch.Tensor, GroupStatistics]`: The output `[B, T, D]`, 0 for padding, and the statistics of the
        batch's groups.
    """
    num_rows, missing_rows = hidden_states.shape[0], -hidden_states.shape[0] % group_size
    if missing_rows and token_mask is None:
        token_mask = hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool)
    x = _form_groups(hidden_states, group_size, missing_rows)  # [A, G, T, D]
    l = _form_groups(logits, group_size, missing_rows)  # [A, G, T, E]
    spans = _form_groups(spans, group_size, missing_rows)  # [A, G, T]

    if token_mask is None:
        z = l.logsumexp(dim=1)  # [A, T, E]
    else:
        present = _form_groups(token_mask[..., None], group_size, missing_rows)  # [A, G, T, 1]
        x, l = x.masked_fill(~present, 0), l.masked_fill(~present, -torch.inf)
        spans = spans.masked_fill(~present[..., 0], 0)
        num_absent = group_size - present.sum(dim=1)  # [A, T, 1]
        a = num_absent.float().log() + companions.log_mass  # [A, T, E], -inf where nobody is absent
        z = torch.cat([l, a[:, None]], dim=1).logsumexp(dim=1)  # [A, T, E]

    # The groups of tokens in one axis, copied where A > 1: `torch.matmul` would copy the weights for each product.
    w = (l - z[:, None]).exp().to(x.dtype).transpose(1, 2).flatten(0, 1)  # [N, G, E]
    mixture = w.mT @ x.transpose(1, 2).flatten(0, 1)  # [N, E, D]
    spans = spans.amax(dim=1).flatten()  # [N]
    if token_mask is not None:
        w_absent = (a - z).exp().flatten(0, 1)[..., None]  # [N, E, 1]
        expected_input = companions.mean_input + companions.input_shift[spans][:, None]  # [N, E, D]
        mixture = (mixture + w_absent * expected_input).to(mixture.dtype)

    slab = mixture.transpose(0, 1)  # [E, N, D]
    y = experts(slab)  # [E, N, D]
    output = (w @ y.transpose(0, 1)).unflatten(0, z.shape[:2])  # [A, T, G, D]
    output = output.transpose(1, 2).flatten(0, 1)  # [A * G, T, D]
    if missing_rows:  # or the backward pass would copy the gradient for nothing
        output = output[:num_rows]  # [B, T, D]

    num_present = group_size if token_mask is None else (group_size - num_absent).flatten()  # [N]
    return output, _average_groups(z.flatten(0, 1) - log(group_size), slab, y, num_present, spans)


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


def _form_groups(rows: Tensor, group_size: int, missing_rows: int) -> Tensor:
    """Cut rows `[B, T, ...]` into groups `[A, G, T, ...]`, the last one filled up with zeros."""
    if missing_rows:
        rows = torch.cat([rows, rows.new_zeros(missing_rows, *rows.shape[1:])])
    return rows.unflatten(0, (-1, group_size))


@torch.no_grad()
def _average_groups(
    log_mass: Tensor, slab: Tensor, outputs: Tensor, num_present: Tensor | int, spans: Tensor
) -> GroupStatistics:
    """Average log masses `[N, E]`, mixtures and outputs `[E, N, D]` over groups, by their numbers of tokens `[N]`."""
    counts = (spans == torch.arange(NUM_SPANS, device=spans.device)[:, None]) * (1.0 * num_present)  # [P, N]
    num_tokens = counts.sum(dim=1)  # [P]
    span_share = counts / num_tokens.clamp(min=1)[:, None]  # [P, N]
    met = (num_tokens > 0)[:, None]  # [P, 1]
    with maybe_autocast(device_type=slab.device.type, enabled=False):
        if isinstance(num_present, int):
            means = [log_mass.mean(0), *(values.mean(1, dtype=torch.float32) for values in (slab, outputs))]
        else:
            share = num_present / num_present.sum()  # [N], not a number where there is nothing but padding
            means = [share @ values.float() for values in (log_mass, slab, outputs)]
        shifts = [
            met * (span_share @ values.mean(0, dtype=torch.float32) - mean.mean(0))  # [P, D]
            for values, mean in zip((slab, outputs), means[1:], strict=True)
        ]
    return GroupStatistics(TypicalGroup(*means, *shifts), num_tokens)
