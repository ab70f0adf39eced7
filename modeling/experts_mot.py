"""The heavy part of a MoT layer as one operation: mix tokens, run every expert, hand the outputs back to the tokens.

Between its products a layer's cost is memory. Mixtures `[E, N, D]` are E / G times as large as the tokens, and so are
their gradients: they exist for a part of the experts at a time, and the backward pass makes the mixtures of a part
again. Kept are the experts' outputs, which the gradient of the weights needs, and their gates and values. Within a
part, experts run in chunks, and hidden features exist for a chunk alone.

Axes: A groups of rows, G tokens of a group, T columns, N = A * T groups of tokens, E experts, D model width, F expert
width, R = 1 + P ranges of groups: all of them, and those of P position buckets. A group has H rows: its G tokens, and
if tokens are absent from any group, H = G + 1: the last row then stands for all that are absent.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils.import_utils import is_tracing

from .autograd_mot import (
    find_autocast_dtype,
    has_own_derivative,
    needs_plain_backward,
    run_plain_backward,
    without_autocast,
)
from .gates_mot import Activation, run_gates, run_gates_backward, run_gates_forward
from .products_mot import dot, hand_back, mix, mix_backward, multiply_in_float32, multiply_into, new_rows

# Elements that the mixtures of a part, and the gates and values of a chunk, may have. On a CPU a chunk is still in the
# cache when the second product reads it, and memory of a part must come from the system anew, which takes longer than
# its product of mixing. A GPU wants few kernels, and long ones.
_CPU_ELEMENTS = (2**24, 2**19)
_GPU_ELEMENTS = (2**28, 2**27)
# The products of mixing slow down with fewer experts in a part.
_MIN_PART = 32
# With more groups of rows, each of which takes a product of its own, the tokens are copied into one.
_MAX_ROW_GROUPS = 16


class Mixed(NamedTuple):
    """What the experts hand back.

    Args:
        output (`torch.Tensor` of shape `[A, G, T, D]`): The output.
        sums (`torch.Tensor` of shape `[2, E, D]`, *optional*):
            Mixtures and experts' outputs, summed over tokens; float32.
        bucket_sums (`torch.Tensor` of shape `[2, P, D]`, *optional*):
            The same, summed over the tokens of each position bucket and over experts.
    """

    output: Tensor
    sums: Tensor | None
    bucket_sums: Tensor | None


def mix_and_run(
    x: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    activation: Activation,
    mean_input: Tensor | None = None,
    counts: Tensor | None = None,
) -> Mixed:
    """Run every expert on its mixtures of all groups, and give its outputs to the tokens that it mixed.

    Derivatives of any order, and by any of torch's methods, are those of the plain products.

    Args:
        x (`torch.Tensor` of shape `[A, H, T, D]`): The tokens, and with `mean_input` a row for absent ones.
        weights (`torch.Tensor` of shape `[A, H, T, E]`): The mixing weights.
        gate_up_proj (`torch.Tensor` of shape `[E, 2F, D]`): The experts' first weights.
        down_proj (`torch.Tensor` of shape `[E, D, F]`): The experts' last weights.
        activation (`Callable`): Activation of the gates.
        mean_input (`torch.Tensor` of shape `[E, D]`, *optional*):
            What an expert adds to the last row of `x`; has no gradient. By default all rows of `x` are tokens.
        counts (`torch.Tensor` of shape `[R, N]`, *optional*):
            Numbers of tokens of every group: in the first row of all, in the others of one position bucket. By default
            no sums are computed.

    Returns:
        `Mixed`: The output of the tokens, and the sums.
    """
    if dtype := find_autocast_dtype(x):
        x, weights, gate_up_proj, down_proj = (value.to(dtype) for value in (x, weights, gate_up_proj, down_proj))
    mean_input = None if mean_input is None else mean_input.detach().to(x.dtype)
    differentiable = (x, weights, gate_up_proj, down_proj)
    with without_autocast(x):
        if _needs_plain(*differentiable, activation):
            return _run_plain(*differentiable, mean_input, counts, activation)
        num_groups = x.shape[0]
        # Whether gradients are needed is asked here: inside an autograd function they are always off.
        needs_grad = torch.is_grad_enabled() and any(value.requires_grad for value in differentiable)
        if num_groups > _MAX_ROW_GROUPS:
            x, weights = _join_row_groups(x), _join_row_groups(weights)
        tensors = (x, weights, gate_up_proj, down_proj, mean_input, counts)
        output, *sums = _MixAndRun.apply(*tensors, activation, needs_grad)
    if num_groups > _MAX_ROW_GROUPS:
        output = output[0].unflatten(1, (num_groups, -1)).transpose(0, 1)  # [A, G, T, D]
    return Mixed(output, *sums)


def _join_row_groups(values: Tensor) -> Tensor:
    """Values `[A, H, T, ...]` as those of one group of longer rows `[1, H, N, ...]`."""
    return values.transpose(0, 1).flatten(1, 2)[None]


def _needs_plain(x: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor, activation: Activation) -> bool:
    """Whether only torch's own operations will do."""
    return x.is_meta or not has_own_derivative(x, weights, gate_up_proj, down_proj, activation=activation)


def _run_plain(
    x: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    mean_input: Tensor | None,
    counts: Tensor | None,
    activation: Activation,
) -> Mixed:
    def run(rows: Tensor) -> Tensor:
        return run_rows(rows, gate_up_proj, down_proj, activation)

    return mix_and_call(x, weights, run, mean_input, counts)


def run_rows(rows: Tensor, gate_up_proj: Tensor, down_proj: Tensor, activation: Activation) -> Tensor:
    """Run every expert on rows of its own `[E, N, D]`; returns outputs of the same shape."""
    gate_up_proj, down_proj = gate_up_proj.to(rows.dtype), down_proj.to(rows.dtype)
    hidden = run_gates(torch.bmm(rows, gate_up_proj.mT), activation)  # [E, N, F]
    return torch.bmm(hidden, down_proj.mT)  # [E, N, D]


def mix_and_call(
    x: Tensor,
    weights: Tensor,
    run: Callable[[Tensor], Tensor],
    mean_input: Tensor | None = None,
    counts: Tensor | None = None,
) -> Mixed:
    """[`mix_and_run`] by torch's own products, with experts wherever they are.

    Args:
        x, weights, mean_input, counts: As in [`mix_and_run`].
        run (`Callable`): Maps the mixtures `[E, N, D]` of all experts to their outputs.

    Returns:
        `Mixed`: The output of the tokens, and the sums.
    """
    num_row_groups, num_rows, num_columns, _ = x.shape
    num_tokens = num_rows - (mean_input is not None)
    x, weights = (value.transpose(1, 2).flatten(0, 1) for value in (x, weights))  # [N, H, D], [N, H, E]
    mixture = weights.mT @ x  # [N, E, D]
    if mean_input is not None:
        mixture = mixture + weights[:, -1, :, None] * mean_input
    rows = mixture.transpose(0, 1)  # [E, N, D]
    outputs = run(rows)  # [E, N, D]
    output = weights[:, :num_tokens] @ outputs.transpose(0, 1)  # [N, G, D]
    output = output.unflatten(0, (num_row_groups, num_columns)).transpose(1, 2)  # [A, G, T, D]
    if counts is None:
        return Mixed(output, None, None)
    with without_autocast(x):
        sums = [
            multiply_in_float32(counts.expand(len(rows), -1, -1), value.detach(), num_tokens)
            for value in (rows, outputs)
        ]
        return Mixed(output, *_split_sums(torch.stack(sums)))


def _split_sums(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Sums `[2, E, R, D]` as those of all groups `[2, E, D]`, and of each bucket over experts `[2, P, D]`."""
    return sums[:, :, 0].clone(), sums[:, :, 1:].sum(dim=1)


class _MixAndRun(torch.autograd.Function):
    """The operation in parts."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        mean_input: Tensor | None,
        counts: Tensor | None,
        activation: Activation,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        tensors = (x, weights, gate_up_proj, down_proj)
        if is_tracing(x):
            output, sums, bucket_sums, gates, outputs = torch.ops.mot.mix_and_run(
                *tensors, mean_input, counts, needs_grad
            )
        else:
            output, sums, bucket_sums, gates, outputs = _run_in_parts(
                *tensors, mean_input, counts, needs_grad, activation
            )
        if needs_grad:
            ctx.save_for_backward(*tensors, mean_input, gates, outputs)
            ctx.activation = activation
        ctx.set_materialize_grads(False)
        if counts is None:
            return output, None, None
        ctx.mark_non_differentiable(sums, bucket_sums)
        return output, sums, bucket_sums

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad, (*tensors, mean_input, gates, outputs) = grads[0], ctx.saved_tensors
        needed = ctx.needs_input_grad[:4]
        if grad is None:
            return (None,) * 8
        if is_tracing(grad):
            results = torch.ops.mot.mix_and_run_backward(grad, *tensors, mean_input, gates, outputs, list(needed))
        elif needs_plain_backward(grad):

            def run(*inputs: Tensor) -> Tensor:
                return _run_plain(*inputs, mean_input, None, ctx.activation).output

            results = run_plain_backward(run, tensors, grad, needed)
        else:
            results = _run_backward_in_parts(grad, *tensors, mean_input, gates, outputs, needed, ctx.activation)
        return *(value if wanted else None for value, wanted in zip(results, needed, strict=True)), *(None,) * 4


def _run_in_parts(
    x: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    mean_input: Tensor | None,
    counts: Tensor | None,
    needs_grad: bool,
    activation: Activation,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output, the sums twice, and for the backward pass gates `[E, N, 2F]` and outputs `[E, N, D]`."""
    num_tokens, num_groups = x.shape[1] - (mean_input is not None), x.shape[0] * x.shape[2]
    num_experts, num_features, width = gate_up_proj.shape
    outputs = x.new_empty(num_experts, num_groups, width)  # [E, N, D]
    gates = x.new_empty(num_experts if needs_grad else 0, num_groups, num_features)  # [E, N, 2F]
    sums = x.new_empty(2, num_experts, 0 if counts is None else len(counts), width, dtype=torch.float32)
    for part, chunks in _cut_experts(x, gate_up_proj):
        rows = mix(x, weights[..., part], mean_input, part)  # [E, N, D] of this part's experts
        for chunk in chunks:
            own = slice(chunk.start - part.start, chunk.stop - part.start)
            gate = gates[chunk] if needs_grad else x.new_empty(own.stop - own.start, num_groups, num_features)
            torch.bmm(rows[own], gate_up_proj[chunk].mT, out=gate)
            torch.bmm(run_gates_forward(gate, activation), down_proj[chunk].mT, out=outputs[chunk])
        if counts is not None:
            for values, result in zip((rows, outputs[part]), sums, strict=True):
                multiply_in_float32(counts.expand(len(rows), -1, -1), values, num_tokens, out=result[part])
    output = new_rows(x[:, :num_tokens])  # [A, G, T, D]
    hand_back(output, weights[:, :num_tokens], outputs)
    if counts is None:
        of_all, of_buckets = sums.new_empty(0), sums.new_empty(0)
    else:
        of_all, of_buckets = _split_sums(sums)
    return output, of_all, of_buckets, gates, outputs


def _run_backward_in_parts(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    mean_input: Tensor | None,
    gates: Tensor,
    outputs: Tensor,
    needed: Sequence[bool],
    activation: Activation,
) -> list[Tensor]:
    """The gradients of the first four tensors; those that are not needed are empty."""
    num_tokens = grad.shape[1]
    grad_x, grad_weights, *of_experts = results = _new_gradients(x, weights, gate_up_proj, down_proj, needed)
    if needed[1]:
        grad_weights[:, num_tokens:].zero_()
        dot(grad_weights[:, :num_tokens], grad, outputs)
    for part, chunks in _cut_experts(x, gate_up_proj):
        grad_rows = mix(grad, weights[:, :num_tokens, :, part])  # [E, N, D], of the outputs
        rows = mix(x, weights[..., part], mean_input, part) if needed[2] else None  # [E, N, D]
        for chunk in chunks:
            own = slice(chunk.start - part.start, chunk.stop - part.start)
            own_experts = (gate_up_proj[chunk], down_proj[chunk], gates[chunk], activation)
            of_own_experts = [value[chunk] if len(value) else None for value in of_experts]
            _run_experts_backward(grad_rows[own], None if rows is None else rows[own], *own_experts, of_own_experts)
        own_mean_input = None if mean_input is None else mean_input[part]
        own_grads = (grad_x if needed[0] else None, grad_weights[..., part] if needed[1] else None)
        mix_backward(grad_rows, x, weights[..., part], own_mean_input, *own_grads, adds=part.start > 0)
    return results


def _run_experts_backward(
    grad_rows: Tensor,
    rows: Tensor | None,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gates: Tensor,
    activation: Activation,
    of_experts: list[Tensor | None],
) -> None:
    """Turn gradients of a chunk's outputs `[E, N, D]` into those of its mixtures `rows`, and write its weights'."""
    grad_gate_up, grad_down = of_experts
    grad_hidden = torch.bmm(grad_rows, down_proj)  # [E, N, F]
    hidden, grad_gates = run_gates_backward(gates, grad_hidden, activation)  # [E, N, F], [E, N, 2F]
    if grad_down is not None:
        torch.bmm(grad_rows.mT, hidden, out=grad_down)
    if grad_gate_up is not None and rows is not None:
        torch.bmm(grad_gates.mT, rows, out=grad_gate_up)
    multiply_into(grad_rows, grad_gates, gate_up_proj)


def _new_gradients(
    x: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor, needed: Sequence[bool]
) -> list[Tensor]:
    """Memory for the gradients that are needed, else none."""
    rows = new_rows(x) if needed[0] else x.new_empty(0)  # [A, H, T, D]
    others = (
        torch.empty_like(value, memory_format=torch.contiguous_format) if wanted else x.new_empty(0)
        for value, wanted in zip((weights, gate_up_proj, down_proj), needed[1:], strict=True)
    )
    return [rows, *others]


def _cut_experts(x: Tensor, gate_up_proj: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Parts of the experts whose mixtures exist together, each with its chunks whose hidden features do."""
    part_elements, chunk_elements = _CPU_ELEMENTS if x.device.type == "cpu" else _GPU_ELEMENTS
    num_groups, (num_experts, num_features, width) = x.shape[0] * x.shape[2], gate_up_proj.shape
    length = max(_MIN_PART, part_elements // max(1, num_groups * width))
    for part in _cut(0, num_experts, length):
        yield part, _cut(part.start, part.stop, max(1, chunk_elements // max(1, num_groups * num_features)))


def _cut(start: int, stop: int, length: int) -> list[slice]:
    """Slices of about the same length, at most `length`."""
    num_slices = -(-(stop - start) // length)
    length = -(-(stop - start) // max(1, num_slices))
    return [slice(first, min(first + length, stop)) for first in range(start, stop, length)]


@torch.library.custom_op("mot::mix_and_run", mutates_args=())
def _mix_and_run_op(
    x: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    mean_input: Tensor | None,
    counts: Tensor | None,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    # Opaque to compilers: they would unroll the loops, and keep what the backward pass is meant to make again.
    return _run_in_parts(x, weights, gate_up_proj, down_proj, mean_input, counts, needs_grad, nn.functional.silu)


@_mix_and_run_op.register_fake
def _(
    x: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    mean_input: Tensor | None,
    counts: Tensor | None,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_tokens, num_groups = x.shape[1] - (mean_input is not None), x.shape[0] * x.shape[2]
    num_experts, num_features, width = gate_up_proj.shape
    of_all, of_buckets = (0,) if counts is None else (2, num_experts, width), (0,)
    if counts is not None:
        of_buckets = (2, counts.shape[0] - 1, width)
    return (
        new_rows(x[:, :num_tokens]),
        x.new_empty(of_all, dtype=torch.float32),
        x.new_empty(of_buckets, dtype=torch.float32),
        x.new_empty(num_experts if needs_grad else 0, num_groups, num_features),
        x.new_empty(num_experts, num_groups, width),
    )


@torch.library.custom_op("mot::mix_and_run_backward", mutates_args=())
def _mix_and_run_backward_op(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    mean_input: Tensor | None,
    gates: Tensor,
    outputs: Tensor,
    needed: list[bool],
) -> list[Tensor]:
    return _run_backward_in_parts(
        grad, x, weights, gate_up_proj, down_proj, mean_input, gates, outputs, needed, nn.functional.silu
    )


@_mix_and_run_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    mean_input: Tensor | None,
    gates: Tensor,
    outputs: Tensor,
    needed: list[bool],
) -> list[Tensor]:
    return _new_gradients(x, weights, gate_up_proj, down_proj, needed)


__all__ = ["Mixed", "mix_and_call", "mix_and_run", "run_rows"]
