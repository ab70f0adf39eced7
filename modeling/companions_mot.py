"""Companions: running statistics of the typical group of tokens, which stand in for rows that a batch does not have.

Axes: B rows, T columns, G group size, A = B / G groups of rows, N = A * T groups of tokens, L layers, E experts,
D model width, P position buckets, R = 1 + P ranges of groups: all of them, and those of each position bucket.
"""

from collections.abc import Callable
from math import log
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers.utils.generic import maybe_autocast
from transformers.utils.import_utils import is_tracing

from .configuration_mot import MoTConfig

# Position buckets 0, 1-2, 3-6, 7-14, ..., each twice as long as the one before; the last one is open.
NUM_POSITION_BUCKETS = 16


class RunningStatistics(NamedTuple):
    """Statistics of the typical group of tokens, as means over groups; all float32.

    Those of a layer are running averages. Those of one batch, by which they are updated, have the same fields.

    Tokens with little context differ from later ones, and so do their mixtures. To a good approximation they differ in
    the same way for all experts, hence the shifts by position bucket, averaged over experts.

    Args:
        log_mass (`torch.Tensor` of shape `[E]`):
            Logsumexp of the group's logits, minus log G.
        mean_input (`torch.Tensor` of shape `[E, D]`):
            The expert's mixture.
        mean_output (`torch.Tensor` of shape `[E, D]`):
            The expert's output.
        input_shift (`torch.Tensor` of shape `[P, D]`):
            Difference between the mixtures of a bucket and `mean_input`.
        output_shift (`torch.Tensor` of shape `[P, D]`):
            Difference between the experts' outputs in a bucket and `mean_output`.
    """

    log_mass: Tensor
    mean_input: Tensor
    mean_output: Tensor
    input_shift: Tensor
    output_shift: Tensor


class Groups(NamedTuple):
    """How the tokens of a batch form groups, which is the same in all layers.

    Args:
        buckets (`torch.Tensor` of shape `[N]`):
            Position bucket of every group: the latest of its tokens' buckets.
        counts (`torch.Tensor` of shape `[R, N]`):
            Number of tokens of every group: in the first row of all groups, in the others of one bucket's, else 0.
        num_tokens (`torch.Tensor` of shape `[R]`):
            Number of tokens: in all, and by bucket.
        present (`torch.Tensor` of shape `[A, G, T, 1]`, *optional*):
            `True` for tokens, `False` for padding and rows that fill up the last group. `None` if there are neither.
        log_absent (`torch.Tensor` of shape `[A, T, 1]`, *optional*):
            Logarithm of the number of absent tokens of every group.
    """

    buckets: Tensor
    counts: Tensor
    num_tokens: Tensor
    present: Tensor | None = None
    log_absent: Tensor | None = None

    def to(self, device: torch.device) -> "Groups":
        """The same on another device."""
        return Groups(*(None if value is None else value.to(device) for value in self))


class GroupSums(NamedTuple):
    """What the statistics of one batch need from a layer; mixtures and the experts' outputs in one tensor.

    Args:
        largest_logits (`torch.Tensor` of shape `[N, E]`): The largest of a group's logits.
        largest_weights (`torch.Tensor` of shape `[N, E]`): The mixing weight that belongs to it; float32.
        sums (`torch.Tensor` of shape `[2, E, D]`): Mixtures and outputs, summed over tokens.
        bucket_sums (`torch.Tensor` of shape `[2, P, D]`):
            Mixtures and outputs, summed over the tokens of a bucket and over experts.
    """

    largest_logits: Tensor
    largest_weights: Tensor
    sums: Tensor
    bucket_sums: Tensor


class MoTCompanions(nn.Module):
    """Running averages of the typical group, which stand in for a token's absent companions.

    They are to MoT what running mean and variance are to batch normalisation, and are updated in place like them:
    persistent buffers, in float32 whatever the model's dtype. Until `1 / companion_momentum` micro-batches have been
    seen they are plain averages.
    """

    log_mass: Tensor
    mean_input: Tensor
    mean_output: Tensor
    input_shift: Tensor
    output_shift: Tensor
    num_batches_tracked: Tensor
    num_bucket_batches: Tensor

    def __init__(self, config: MoTConfig) -> None:
        super().__init__()
        self.config = config
        num_experts, width = config.num_experts, config.hidden_size
        for name, shape in (
            ("log_mass", (num_experts,)),
            ("mean_input", (num_experts, width)),
            ("mean_output", (num_experts, width)),
            ("input_shift", (NUM_POSITION_BUCKETS, width)),
            ("output_shift", (NUM_POSITION_BUCKETS, width)),
        ):
            # bfloat16 would lose every update with momentum 0.1 in which batch and average differ by less than 1 %.
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))
        self.register_buffer("num_bucket_batches", torch.zeros(NUM_POSITION_BUCKETS, dtype=torch.long))

    def expected(self) -> RunningStatistics:
        """The running averages."""
        self._restore_float32()
        return RunningStatistics(*(getattr(self, name).float() for name in RunningStatistics._fields))

    def snapshot(self) -> RunningStatistics:
        """Copies of the running averages, for a backward pass that comes after their next update."""
        expected = self.expected()
        if is_compiling():
            return RunningStatistics(*torch.ops.mot.snapshot(list(expected)))
        return RunningStatistics(*(value.clone() for value in expected))

    @torch.no_grad()
    def replace(self, statistics: RunningStatistics, num_tokens: Tensor, num_batches: int) -> None:
        """Set the running averages to the statistics of `num_batches` batches, with `num_tokens` `[P]` by bucket."""
        self._restore_float32()
        self.num_batches_tracked.fill_(num_batches)
        self.num_bucket_batches.copy_(num_batches * (num_tokens > 0))
        for name, value in statistics._asdict().items():
            getattr(self, name).copy_(value)
        self.fill_buckets()

    @torch.no_grad()
    def fill_buckets(self) -> None:
        """Give each bucket that never had a token the shifts of the nearest lower one that had."""
        nearest = _find_nearest(self.num_bucket_batches)  # [P]
        for shift in (self.input_shift, self.output_shift):
            shift.copy_(shift[nearest])

    def _restore_float32(self) -> None:
        # FSDP 1, `load_checkpoint_and_dispatch` and `load_state_dict(assign=True)` cast buffers without `_apply`.
        for name in RunningStatistics._fields:
            buffer = getattr(self, name)
            if buffer.dtype != torch.float32 and not is_tracing(buffer):
                with torch.inference_mode(False):  # training cannot change a tensor of inference mode in place
                    setattr(self, name, buffer.float())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Casting a model (`model.to(torch.bfloat16)`, `model.half()`) must not cast its statistics.
        def move(buffer: Tensor) -> Tensor:
            moved = fn(buffer)
            return moved if moved.dtype == buffer.dtype else buffer.to(moved.device)

        return super()._apply(move, recurse)


def is_compiling() -> bool:
    """Whether a graph is made that may hold this package's operators.

    An export may not: it must load where they are not registered.
    """
    # The flag and not `torch.compiler.is_exporting()`, which torch 2.11 compiles as True.
    return torch.compiler.is_compiling() and not torch.compiler._is_exporting_flag


@torch.library.custom_op("mot::snapshot", mutates_args=())
def _snapshot(values: list[Tensor]) -> list[Tensor]:
    # Opaque to compilers: they would save the buffers, not the copies, and copy them in the backward pass, after the
    # update, which gave wrong gradients (torch 2.13).
    return [value.clone() for value in values]


@_snapshot.register_fake
def _(values: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(value) for value in values]


def form_groups(buckets: Tensor, token_mask: Tensor | None, group_size: int) -> Groups:
    """Form groups of up to G consecutive rows at every column.

    Args:
        buckets (`torch.Tensor` of shape `[B, T]`): Position bucket of every token.
        token_mask (`torch.Tensor` of shape `[B, T]`, *optional*): `False` for padding.
        group_size (`int`): Rows G of a group; the last group is short where G does not divide B.

    Returns:
        `Groups`: The groups.
    """
    # Rows that fill up the last group are absent, just like padding.
    if token_mask is None and buckets.shape[0] % group_size:
        token_mask = torch.ones_like(buckets, dtype=torch.bool)
    buckets = cut_rows(buckets, group_size)  # [A, G, T]
    if token_mask is None:
        buckets = buckets.amax(dim=1).flatten()  # [N]
        return Groups(buckets, *_count_tokens(buckets, group_size))
    present = cut_rows(token_mask[..., None], group_size)  # [A, G, T, 1]
    buckets = buckets.masked_fill(~present[..., 0], 0).amax(dim=1).flatten()  # [N]
    num_present = present.sum(dim=1)  # [A, T, 1]
    log_absent = (group_size - num_present).float().log()  # [A, T, 1], -inf where nobody is absent
    return Groups(buckets, *_count_tokens(buckets, num_present.flatten()), present, log_absent)


def cut_rows(rows: Tensor, group_size: int) -> Tensor:
    """Cut rows `[B, T, ...]` into groups `[A, G, T, ...]`, filling up the last one with zeros."""
    missing_rows = -rows.shape[0] % group_size
    if missing_rows:
        rows = torch.cat([rows, rows.new_zeros(missing_rows, *rows.shape[1:])])
    return rows.unflatten(0, (-1, group_size))


def _count_tokens(buckets: Tensor, num_present: Tensor | int) -> tuple[Tensor, Tensor]:
    """Counts `[R, N]` and numbers of tokens `[R]`, see [`Groups`]."""
    bucket = torch.arange(-1, NUM_POSITION_BUCKETS, device=buckets.device)[:, None]  # [R, 1]
    counts = buckets == bucket  # [R, N]
    counts[0] = True
    counts = counts * (1.0 * num_present)  # [R, N]
    return counts, counts.sum(dim=1)


@torch.no_grad()
def average_groups(layers: list[GroupSums], groups: Groups, group_size: int) -> list[RunningStatistics]:
    """The statistics of a batch's groups in every layer; the shift of a bucket without tokens is 0.

    Args:
        layers (`list[GroupSums]`): What each layer computed.
        groups (`Groups`): The groups.
        group_size (`int`): Rows G of a group.

    Returns:
        `list[RunningStatistics]`: Their means, weighted by the groups' numbers of tokens.
    """
    # All layers together, so that each step is one kernel on a GPU.
    logits = torch.cat([layer.largest_logits for layer in layers], dim=1)  # [N, L * E]
    weights = torch.cat([layer.largest_weights for layer in layers], dim=1)  # [N, L * E]
    num_tokens = groups.num_tokens.clamp(min=1)  # [R]
    with maybe_autocast(device_type=logits.device.type, enabled=False):
        means = torch.stack([layer.sums for layer in layers]) / num_tokens[0]  # [L, 2, E, D]
        bucket_sums = torch.stack([layer.bucket_sums for layer in layers])  # [L, 2, P, D]
        bucket_means = bucket_sums / (num_tokens[1:, None] * means.shape[2])  # [L, 2, P, D]
        shifts = (bucket_means - means.mean(dim=2, keepdim=True)) * (groups.num_tokens[1:, None] > 0)
        # The mean over groups of a logarithm. A logarithm of the mean, which pools all tokens, is dominated by a few
        # heavy ones, and gives a worse loss the longer the training.
        log_masses = groups.counts[0] @ (logits - weights.log()) / num_tokens[0] - log(group_size)  # [L * E]
    return [
        RunningStatistics(log_mass, *layer_means, *layer_shifts)
        for log_mass, layer_means, layer_shifts in zip(log_masses.chunk(len(layers)), means, shifts, strict=True)
    ]


@torch.no_grad()
def update_companions(layers: list[MoTCompanions], batch: list[RunningStatistics], num_tokens: Tensor) -> None:
    """Update the running averages of layers by the statistics of one micro-batch, in place.

    A batch is left out if its statistics are not finite in all layers (an overflow), or if it has no token.

    Args:
        layers (`list[MoTCompanions]`): The layers' running averages, on one device.
        batch (`list[RunningStatistics]`): The micro-batch's statistics in the same layers.
        num_tokens (`torch.Tensor` of shape `[1 + P]`): Its numbers of tokens: in all, and by bucket.
    """
    # All layers together, so that each step is one kernel on a GPU, and without a look at the data (`if`), for which a
    # GPU would have to wait: what is left out has rate 0.
    new, running = _pack(batch), _pack([layer.expected() for layer in layers])  # [L, E + 2 * E * D + 2 * P * D]
    is_finite = torch.linalg.vector_norm(new, torch.inf) < torch.inf
    is_updated = is_finite & (num_tokens > 0)  # [1 + P]

    counters = [value for layer in layers for value in (layer.num_batches_tracked, layer.num_bucket_batches)]
    seen = is_updated.long()
    torch._foreach_add_(counters, [seen[0], seen[1:]] * len(layers))
    counts = torch.cat([value.view(-1) for value in counters]).view(len(layers), -1)  # [L, 1 + P]
    # 1 / n for the first batches: with the momentum alone, the zeros of the start would long count as data.
    rates = is_updated / counts.clamp(1, 1 / layers[0].config.companion_momentum)  # [L, 1 + P]

    # A bucket that never had a token follows the nearest lower one that had: at inference a sequence may be longer
    # than any in training.
    nearest = _find_nearest(counts[:, 1:])  # [L, P]
    num_shared = running.shape[1] - 2 * batch[0].input_shift.numel()
    (shared, shifts), (new_shared, new_shifts) = (
        (
            values[:, :num_shared],
            values[:, num_shared:].unflatten(1, (2, NUM_POSITION_BUCKETS, -1)),
        )  # [L, ...], [L, 2, P, D]
        for values in (running, new.nan_to_num(0, 0, 0))  # 0 times NaN would be NaN
    )
    new_shifts = new_shifts.gather(2, nearest[:, None, :, None].expand_as(new_shifts))  # [L, 2, P, D]
    shared = torch.lerp(shared, new_shared, rates[:, :1])
    shifts = torch.lerp(shifts, new_shifts, rates[:, 1:].gather(1, nearest)[:, None, :, None])
    _unpack(shared, shifts, layers)


def _pack(layers: list[RunningStatistics]) -> Tensor:
    """Each layer's statistics in a row `[L, ...]`."""
    return torch.cat([value.flatten() for statistics in layers for value in statistics]).view(len(layers), -1)


def _unpack(shared: Tensor, shifts: Tensor, layers: list[MoTCompanions]) -> None:
    """Write packed statistics back into the layers' buffers."""
    buffers, values = [], []
    for layer, layer_shared, layer_shifts in zip(layers, shared, shifts, strict=True):
        own = [layer.log_mass, layer.mean_input, layer.mean_output]
        parts = layer_shared.split([buffer.numel() for buffer in own])
        buffers += [*own, layer.input_shift, layer.output_shift]
        values += [part.view_as(buffer) for part, buffer in zip(parts, own, strict=True)] + list(layer_shifts)
    torch._foreach_copy_(buffers, values)


def _find_nearest(num_batches: Tensor) -> Tensor:
    """For every bucket of `[..., P]`, the nearest one at or below it that a batch had tokens in, else the first."""
    buckets = torch.arange(NUM_POSITION_BUCKETS, device=num_batches.device)
    met = (num_batches > 0) * buckets  # [..., P]
    # Not `cummax`, which some devices lack; P is small enough for a table of all pairs.
    return met[..., None, :].expand(*met.shape, NUM_POSITION_BUCKETS).tril().amax(dim=-1)  # [..., P]


__all__ = ["MoTCompanions"]
