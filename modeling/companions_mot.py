"""Companions: the statistics of the typical group of tokens, which stand in for rows that a batch does not hold.

Axes: B rows, T columns, G group size, A = B / G groups of rows, N = A * T groups of tokens, L layers, E experts,
D model width, P spans of positions.
"""

from collections.abc import Callable
from math import log
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers.utils.generic import maybe_autocast
from transformers.utils.import_utils import is_tracing

from .configuration_mot import MoTConfig

# Spans of positions 0, 1-2, 3-6, 7-14, ..., each twice as long as the one before; the last one is open.
NUM_SPANS = 16


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


class Groups(NamedTuple):
    """How the tokens of a batch form groups: the same in all layers.

    Args:
        spans (`torch.Tensor` of shape `[N]`):
            Span of positions of every group, the latest of its tokens'.
        weights (`torch.Tensor` of shape `[1 + P, N]`):
            Times values `[N, ...]`, means in which a group counts by its number of tokens: that of all groups in the
            first row, and in the others by how much that of the groups of a span differs from it.
        num_tokens (`torch.Tensor` of shape `[1 + P]`):
            Number of tokens: of all, and by span.
        present (`torch.Tensor` of shape `[A, G, T, 1]`, *optional*):
            `True` for tokens, `False` for padding and rows that fill up the last group. `None` if there are neither.
        log_absent (`torch.Tensor` of shape `[A, T, 1]`, *optional*):
            Logarithm of the number of absent tokens of every group.
    """

    spans: Tensor
    weights: Tensor
    num_tokens: Tensor
    present: Tensor | None = None
    log_absent: Tensor | None = None

    def to(self, device: torch.device) -> "Groups":
        """The same on another device."""
        return Groups(*(None if value is None else value.to(device) for value in self))


class GroupMeans(NamedTuple):
    """What a layer computed for the groups of one batch, as far as their statistics need it.

    Args:
        log_mass (`torch.Tensor` of shape `[N, E]`): Logsumexp of a group's logits.
        mean_input (`torch.Tensor` of shape `[E, D]`): Mixtures, averaged over groups.
        mean_output (`torch.Tensor` of shape `[E, D]`): The experts' outputs, averaged over groups.
        group_input (`torch.Tensor` of shape `[N, D]`): Mixtures, averaged over experts.
        group_output (`torch.Tensor` of shape `[N, D]`): The experts' outputs, averaged over experts.
    """

    log_mass: Tensor
    mean_input: Tensor
    mean_output: Tensor
    group_input: Tensor
    group_output: Tensor


class MoTCompanions(nn.Module):
    """Running averages of the typical group, which stand in for a token's absent companions.

    Persistent float32 buffers in a model of any dtype, to MoT what running mean and variance are to batch
    normalisation, and changed in place like them. While fewer than `1 / companion_momentum` micro-batches have been
    seen they are plain averages.
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
        self._restore_float32()
        return TypicalGroup(*(getattr(self, name).float() for name in TypicalGroup._fields))

    def snapshot(self) -> TypicalGroup:
        """Copies of the running averages, for what a backward pass needs after they have moved on."""
        expected = self.expected()
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            return TypicalGroup(*torch.ops.mot.snapshot(list(expected)))
        return TypicalGroup(*(value.clone() for value in expected))

    @torch.no_grad()
    def replace(self, statistics: TypicalGroup, num_tokens: Tensor, num_batches: int) -> None:
        """Set the running averages to statistics of `num_tokens` `[P]` by span, from `num_batches` batches."""
        self._restore_float32()
        self.num_batches_tracked.fill_(num_batches)
        self.num_span_batches.copy_(num_batches * (num_tokens > 0))
        for name, value in statistics._asdict().items():
            getattr(self, name).copy_(value)
        self.fill_spans()

    @torch.no_grad()
    def fill_spans(self) -> None:
        """Give spans that were never met the shifts of the nearest lower one that was."""
        nearest = _find_nearest(self.num_span_batches)  # [P]
        for shift in (self.input_shift, self.output_shift):
            shift.copy_(shift[nearest])

    def _restore_float32(self) -> None:
        # FSDP 1, `load_checkpoint_and_dispatch` and `load_state_dict(assign=True)` put buffers of other dtypes here.
        for name in TypicalGroup._fields:
            buffer = getattr(self, name)
            if buffer.dtype != torch.float32 and not is_tracing(buffer):
                with torch.inference_mode(False):  # or it could not be changed in place in training
                    setattr(self, name, buffer.float())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Casting a model (`model.to(torch.bfloat16)`, `model.half()`) moves these buffers but keeps their dtype.
        def move(buffer: Tensor) -> Tensor:
            moved = fn(buffer)
            return moved if moved.dtype == buffer.dtype else buffer.to(moved.device)

        return super()._apply(move, recurse)


@torch.library.custom_op("mot::snapshot", mutates_args=())
def _snapshot(values: list[Tensor]) -> list[Tensor]:
    # Opaque to compilers: they would save the buffers instead of copies, and copy them in the backward pass, when they
    # have been changed (torch 2.13).
    return [value.clone() for value in values]


@_snapshot.register_fake
def _(values: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(value) for value in values]


def form_groups(spans: Tensor, token_mask: Tensor | None, group_size: int) -> Groups:
    """Form groups of up to G consecutive rows at every column.

    Args:
        spans (`torch.Tensor` of shape `[B, T]`): Span of positions of every token.
        token_mask (`torch.Tensor` of shape `[B, T]`, *optional*): `False` for padding.
        group_size (`int`): Rows G of a group; the last group is short where G does not divide B.

    Returns:
        `Groups`: The groups.
    """
    if token_mask is None and spans.shape[0] % group_size:
        token_mask = torch.ones_like(spans, dtype=torch.bool)
    spans = cut_rows(spans, group_size)  # [A, G, T]
    if token_mask is None:
        spans = spans.amax(dim=1).flatten()  # [N]
        return Groups(spans, *_weigh_groups(spans, group_size))
    present = cut_rows(token_mask[..., None], group_size)  # [A, G, T, 1]
    spans = spans.masked_fill(~present[..., 0], 0).amax(dim=1).flatten()  # [N]
    num_present = present.sum(dim=1)  # [A, T, 1]
    log_absent = (group_size - num_present).float().log()  # [A, T, 1], -inf where nobody is absent
    return Groups(spans, *_weigh_groups(spans, num_present.flatten()), present, log_absent)


def cut_rows(rows: Tensor, group_size: int) -> Tensor:
    """Cut rows `[B, T, ...]` into groups `[A, G, T, ...]`, the last one filled up with zeros."""
    missing_rows = -rows.shape[0] % group_size
    if missing_rows:
        rows = torch.cat([rows, rows.new_zeros(missing_rows, *rows.shape[1:])])
    return rows.unflatten(0, (-1, group_size))


def _weigh_groups(spans: Tensor, num_present: Tensor | int) -> tuple[Tensor, Tensor]:
    """Weights `[1 + P, N]` and numbers of tokens `[1 + P]`, see [`Groups`]."""
    span = torch.arange(-1, NUM_SPANS, device=spans.device)[:, None]  # [1 + P, 1]
    counts = spans == span  # [1 + P, N]
    counts[0] = True
    counts = counts * (1.0 * num_present)  # [1 + P, N]
    num_tokens = counts.sum(dim=1)  # [1 + P]
    weights = counts / num_tokens.clamp(min=1)[:, None]  # [1 + P, N]
    weights[1:].sub_(weights[:1] * (num_tokens[1:, None] > 0))
    return weights, num_tokens


@torch.no_grad()
def measure_groups(log_mass: Tensor, slab: Tensor, outputs: Tensor, groups: Groups) -> GroupMeans:
    """Average mixtures and outputs `[E, N, D]` of one layer; its log masses `[N, E]` are kept as they are."""
    with maybe_autocast(device_type=slab.device.type, enabled=False):
        if groups.present is None:
            means = [values.mean(dim=1, dtype=torch.float32) for values in (slab, outputs)]  # [E, D]
        else:
            means = [groups.weights[0] @ values.float() for values in (slab, outputs)]  # [E, D]
        by_group = [values.mean(dim=0, dtype=torch.float32) for values in (slab, outputs)]  # [N, D]
    return GroupMeans(log_mass.detach(), *means, *by_group)


@torch.no_grad()
def average_groups(layers: list[GroupMeans], groups: Groups, group_size: int) -> list[TypicalGroup]:
    """The statistics of a batch's groups in every layer; the shift of a span without tokens is 0.

    Args:
        layers (`list[GroupMeans]`): What each layer computed.
        groups (`Groups`): The groups.
        group_size (`int`): Rows G of a group.

    Returns:
        `list[TypicalGroup]`: Their means, a group counting by its number of tokens.
    """
    by_group = torch.stack([value for layer in layers for value in (layer.group_input, layer.group_output)])
    log_masses = torch.cat([layer.log_mass for layer in layers], dim=1)  # [N, L * E]
    with maybe_autocast(device_type=by_group.device.type, enabled=False):
        shifts = (groups.weights[1:] @ by_group).unflatten(0, (-1, 2))  # [L, 2, P, D]
        log_masses = groups.weights[0] @ log_masses - log(group_size)  # [L * E]
    return [
        TypicalGroup(log_mass, layer.mean_input, layer.mean_output, *shifts_of_layer)
        for layer, log_mass, shifts_of_layer in zip(layers, log_masses.chunk(len(layers)), shifts, strict=True)
    ]


@torch.no_grad()
def absorb(layers: list[MoTCompanions], batch: list[TypicalGroup], num_tokens: Tensor) -> None:
    """Move the running averages of layers towards the statistics of one micro-batch, in place.

    All layers together: each step is one kernel on a GPU. A batch whose statistics are not finite in all layers (an
    overflow) or that holds no token is left out.

    Args:
        layers (`list[MoTCompanions]`): The layers' running averages, on one device.
        batch (`list[TypicalGroup]`): The micro-batch's statistics in the same layers.
        num_tokens (`torch.Tensor` of shape `[1 + P]`): Its numbers of tokens: of all, and by span.
    """
    new, running = _pack(batch), _pack([layer.expected() for layer in layers])  # [L, E + 2 * E * D + 2 * P * D]
    is_finite = torch.linalg.vector_norm(new, torch.inf) < torch.inf
    moves = is_finite & (num_tokens > 0)  # [1 + P]

    counters = [value for layer in layers for value in (layer.num_batches_tracked, layer.num_span_batches)]
    seen = moves.long()
    torch._foreach_add_(counters, [seen[0], seen[1:]] * len(layers))
    counts = torch.cat([value.view(-1) for value in counters]).view(len(layers), -1)  # [L, 1 + P]
    rates = moves / counts.clamp(1, 1 / layers[0].config.companion_momentum)  # [L, 1 + P]

    # A span that was never met moves with the nearest lower one that was.
    nearest = _find_nearest(counts[:, 1:])  # [L, P]
    num_shared = running.shape[1] - 2 * batch[0].input_shift.numel()
    (shared, shifts), (new_shared, new_shifts) = (
        (values[:, :num_shared], values[:, num_shared:].unflatten(1, (2, NUM_SPANS, -1)))  # [L, ...], [L, 2, P, D]
        for values in (running, new.nan_to_num(0, 0, 0))
    )
    new_shifts = new_shifts.gather(2, nearest[:, None, :, None].expand_as(new_shifts))  # [L, 2, P, D]
    shared = torch.lerp(shared, new_shared, rates[:, :1])
    shifts = torch.lerp(shifts, new_shifts, rates[:, 1:].gather(1, nearest)[:, None, :, None])
    _unpack(shared, shifts, layers)


def _pack(groups: list[TypicalGroup]) -> Tensor:
    """The statistics of each layer in a row `[L, ...]`."""
    return torch.cat([value.flatten() for group in groups for value in group]).view(len(groups), -1)


def _unpack(shared: Tensor, shifts: Tensor, layers: list[MoTCompanions]) -> None:
    """Write packed statistics back into the layers' buffers."""
    buffers, values = [], []
    for layer, of_layer, shifts_of_layer in zip(layers, shared, shifts, strict=True):
        own = [layer.log_mass, layer.mean_input, layer.mean_output]
        parts = of_layer.split([buffer.numel() for buffer in own])
        buffers += [*own, layer.input_shift, layer.output_shift]
        values += [part.view_as(buffer) for part, buffer in zip(parts, own, strict=True)] + list(shifts_of_layer)
    torch._foreach_copy_(buffers, values)


def _find_nearest(num_batches: Tensor) -> Tensor:
    """For every span of `[..., P]`, the nearest one at or below it that was met in a batch, else the first."""
    spans = torch.arange(NUM_SPANS, device=num_batches.device)
    met = (num_batches > 0) * spans  # [..., P]
    return met[..., None, :].expand(*met.shape, NUM_SPANS).tril().amax(dim=-1)  # [..., P]


__all__ = ["MoTCompanions"]
