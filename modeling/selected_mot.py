"""Selected experts on mixtures of their own, as one operation: mode per_sequence in training and for long prompts.

An expert that a token selects runs on the token mixed with its expected companions, so that the K experts of a token
have K different inputs. Pairs of a token and an expert are sorted by expert. On a CPU mixtures exist for one expert at
a time, unless all of them are small; on a GPU a kernel makes them where token choice would copy the tokens. The
backward pass makes them again. Kept are gates and values alone: the gradient of an output's weight, `<grad, output>`,
is `<grad @ down_proj, hidden>`.

Axes: S tokens, E experts, K experts per token, M = S * K pairs of a token and an expert, n pairs of one expert, D
model width, F expert width, P position buckets.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.import_utils import is_tracing

from .autograd_mot import (
    find_autocast_dtype,
    has_own_derivative,
    needs_plain_backward,
    run_plain_backward,
    without_autocast,
)
from .gates_mot import Activation, run_gates, run_gates_forward, run_weighted_gates_backward
from .pairs_mot import Mixing, Pairs, dot_pairs, has_pair_kernels, mix_pairs, sort_pairs, sum_pairs
from .products_mot import fit_grouped_mm

# Vectors `[D]` that mode per_sequence passes to transformers' experts interface at once on a CPU.
_CPU_CHUNK_VECTORS = 8192

# Elements of the mixtures of one expert, up to which a CPU makes those of all experts at once.
_CPU_ELEMENTS_OF_EXPERT = 2**14

# Experts for every pair, up to which that is faster: it looks at all experts, a loop at those with a pair.
_CPU_EXPERTS_OF_PAIR = 50

RunRouted = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class OwnMixtures:
    """How every token is mixed with its expected companions for the experts that it selects.

    Not a tuple, because wrappers of a module's forward (FSDP, accelerate) would cast its contents.

    Args:
        weights (`torch.Tensor` of shape `[S, K]`): Mixing weight w of the token; that of its companions is 1 - w.
        buckets (`torch.Tensor` of shape `[S]`): Position bucket of the token.
        mean_input (`torch.Tensor` of shape `[E, D]`): Mean mixture of every expert, float32; has no gradient.
        input_shift (`torch.Tensor` of shape `[P, D]`): How those of a bucket differ, float32; has no gradient.
    """

    weights: Tensor
    buckets: Tensor
    mean_input: Tensor
    input_shift: Tensor


class _Inputs(NamedTuple):
    """The tensors of the operation; the first five have gradients."""

    x: Tensor  # [S, D]
    weights: Tensor  # [S, K], of the experts' outputs
    gate_up_proj: Tensor  # [E, 2F, D]
    down_proj: Tensor  # [E, D, F]
    mixing_weights: Tensor  # [S, K], of tokens in mixtures
    index: Tensor  # [S, K]
    buckets: Tensor  # [S]
    mean_input: Tensor  # [E, D]
    input_shift: Tensor  # [P, D]

    @property
    def mixing(self) -> Mixing:
        return Mixing(self.x, *self[4:])


_NUM_DIFFERENTIABLE = 5


def copy_and_run(run: RunRouted, tokens: Tensor, index: Tensor, weights: Tensor, own: OwnMixtures) -> Tensor:
    """Run selected experts on mixtures that are passed to them as tokens of their own.

    Args:
        run (`Callable`): Experts with the signature of transformers' experts interface.
        tokens (`torch.Tensor` of shape `[S, D]`): The tokens.
        index (`torch.Tensor` of shape `[S, K]`): The experts that a token selects.
        weights (`torch.Tensor` of shape `[S, K]`): Weights of the experts' outputs.
        own (`OwnMixtures`): How the tokens are mixed.

    Returns:
        `torch.Tensor` of shape `[S, D]`: Weighted sums of the experts' outputs.
    """
    parts = (tokens, index, weights, own.weights, own.buckets)
    # A graph is not sliced, or it would be valid for one number S of tokens only.
    if tokens.device.type == "cpu" and not is_tracing(tokens):
        # Memory for S * K vectors is slow to get unless a slice can use that of the one before.
        length = max(1, _CPU_CHUNK_VECTORS // max(1, index.shape[-1]))
        slices = zip(*(part.split(length) for part in parts), strict=True)
    else:
        slices = [parts]
    outputs = [_copy_and_run_slice(run, *values, own.mean_input, own.input_shift) for values in slices]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _copy_and_run_slice(
    run: RunRouted,
    tokens: Tensor,
    index: Tensor,
    weights: Tensor,
    mixing_weights: Tensor,
    buckets: Tensor,
    mean_input: Tensor,
    input_shift: Tensor,
) -> Tensor:
    # In place, on the copy that indexing makes. In float32, because 1 - w of a large weight would be 0 in bfloat16.
    wide = torch.promote_types(tokens.dtype, torch.float32)
    mixture = mean_input[index].add_(input_shift[buckets][:, None]).to(wide)  # [S, K, D]
    mixture = mixture.lerp_(tokens[:, None].to(wide), mixing_weights[..., None].to(wide))
    mixture = mixture.to(tokens.dtype).flatten(0, 1)  # [S * K, D]
    # Passed as S * K tokens with one expert each: transformers' experts interface gives a token's K experts the same
    # input.
    return run(mixture, index.reshape(-1, 1), weights.reshape(-1, 1)).unflatten(0, index.shape).sum(dim=1)  # [S, D]


def mix_and_run_selected(
    tokens: Tensor,
    index: Tensor,
    weights: Tensor,
    own: OwnMixtures,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    activation: Activation,
) -> Tensor:
    """Run selected experts, each on the token mixed with what the expert expects of its companions.

    Derivatives of any order are those of the plain products.

    Args:
        tokens (`torch.Tensor` of shape `[S, D]`): The tokens.
        index (`torch.Tensor` of shape `[S, K]`): The experts that a token selects.
        weights (`torch.Tensor` of shape `[S, K]`): Weights of the experts' outputs, float32.
        own (`OwnMixtures`): How the tokens are mixed.
        gate_up_proj (`torch.Tensor` of shape `[E, 2F, D]`): The experts' first weights.
        down_proj (`torch.Tensor` of shape `[E, D, F]`): The experts' last weights.
        activation (`Callable`): Activation of the gates.

    Returns:
        `torch.Tensor` of shape `[S, D]`: Weighted sums of the experts' outputs.
    """
    dtype = find_autocast_dtype(tokens) or tokens.dtype
    tokens, gate_up_proj, down_proj = (value.to(dtype) for value in (tokens, gate_up_proj, down_proj))
    means = (own.mean_input.detach(), own.input_shift.detach())
    # A view, because a compiler refuses one tensor in two places, and both weights may be the same.
    weights = weights.view_as(weights)
    inputs = _Inputs(tokens, weights, gate_up_proj, down_proj, own.weights, index, own.buckets, *means)
    # Asked here: inside an autograd function gradients are always off.
    needs_grad = torch.is_grad_enabled() and any(value.requires_grad for value in inputs[:_NUM_DIFFERENTIABLE])
    with without_autocast(tokens):
        return _MixAndRunSelected.apply(*inputs, activation, needs_grad)


def can_run_selected(
    tokens: Tensor, own: OwnMixtures, weights: Tensor, *parameters: Tensor, activation: Activation
) -> bool:
    """Whether [`mix_and_run_selected`] computes these; else torch's own operations must, see [`copy_and_run`]."""
    dtype = find_autocast_dtype(tokens) or tokens.dtype
    if tokens.device.type != "cpu" and not has_pair_kernels(tokens.device, dtype):
        return False
    if dtype == tokens.dtype and any(value.dtype != dtype for value in parameters):
        return False
    return has_own_derivative(tokens, own.weights, weights, *parameters, activation=activation)


class _MixAndRunSelected(torch.autograd.Function):
    """The operation, expert by expert or all in groups."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, activation, needs_grad = arguments
        if is_tracing(tensors[0]):
            output, *saved = torch.ops.mot.mix_and_run_selected(tensors, needs_grad)
        else:
            output, *saved = _run(_Inputs(*tensors), activation, needs_grad)
        if needs_grad:
            ctx.save_for_backward(*tensors, *saved)
            ctx.activation = activation
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        values = ctx.saved_tensors  # once: under checkpointing, a second look raises
        grad, tensors, saved = grads[0], values[:-3], values[-3:]
        needed = ctx.needs_input_grad[:_NUM_DIFFERENTIABLE]
        if is_tracing(grad):
            results = torch.ops.mot.mix_and_run_selected_backward(grad, list(tensors), list(saved), list(needed))
        elif needs_plain_backward(grad):

            def run(*leaves: Tensor) -> Tensor:
                inputs = _Inputs(*leaves, *tensors[_NUM_DIFFERENTIABLE:])
                return _run_plain(inputs, Pairs(*saved[1:]), ctx.activation)

            results = run_plain_backward(run, tensors[:_NUM_DIFFERENTIABLE], grad, needed)
        else:
            results = _run_backward(grad, _Inputs(*tensors), *saved, ctx.activation, needed)
        own = [value if wanted else None for value, wanted in zip(results, needed, strict=True)]
        return *own, *(None,) * (len(ctx.needs_input_grad) - _NUM_DIFFERENTIABLE)


def _run(inputs: _Inputs, activation: Activation, needs_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, and for the backward pass gates `[M, 2F]`, the order of pairs `[M]` and their ends `[E]`."""
    pairs = sort_pairs(inputs.index, len(inputs.gate_up_proj))
    in_groups = has_pair_kernels(inputs.x.device, inputs.x.dtype) or _are_few(inputs)
    run = _run_in_groups if in_groups else _run_one_by_one
    output, gates = run(inputs, pairs, activation, needs_grad)
    return output, gates, pairs.order, pairs.ends


def _are_few(inputs: _Inputs) -> bool:
    """Whether all mixtures together are so small on a CPU that a loop over experts would take longer than they do."""
    num_pairs, width, num_experts = inputs.index.numel(), inputs.x.shape[1], len(inputs.gate_up_proj)
    if inputs.x.dtype != torch.float32 or not fit_grouped_mm(inputs.gate_up_proj, inputs.down_proj):
        return False
    if num_experts > _CPU_EXPERTS_OF_PAIR * num_pairs:
        return False
    return num_pairs * width <= _CPU_ELEMENTS_OF_EXPERT * num_experts


def _run_in_groups(inputs: _Inputs, pairs: Pairs, activation: Activation, needs_grad: bool) -> tuple[Tensor, Tensor]:
    rows = mix_pairs(inputs.mixing, pairs.order)  # [M, D]
    gates = F.grouped_mm(rows, inputs.gate_up_proj.mT, offs=pairs.ends)  # [M, 2F]
    outputs = F.grouped_mm(run_gates_forward(gates, activation), inputs.down_proj.mT, offs=pairs.ends)  # [M, D]
    output = sum_pairs(outputs, inputs.weights, pairs.order)  # [S, D]
    return output, gates if needs_grad else gates.new_empty(0, gates.shape[1])


def _run_one_by_one(inputs: _Inputs, pairs: Pairs, activation: Activation, needs_grad: bool) -> tuple[Tensor, Tensor]:
    output = _new_sums(inputs.x)  # [S, D]
    num_features = inputs.gate_up_proj.shape[1]
    gates = inputs.x.new_empty(len(pairs.order) if needs_grad else 0, num_features)  # [M, 2F]
    for expert in _select_experts(inputs, pairs):
        means = _find_means(inputs, expert)  # [n, D]
        tokens = inputs.x.index_select(0, expert.tokens).to(means.dtype)  # [n, D]
        rows = means.lerp_(tokens, expert.mixing_weights.to(means.dtype)).to(inputs.x.dtype)  # [n, D]
        gate = gates[expert.pairs] if needs_grad else rows.new_empty(len(rows), num_features)  # [n, 2F]
        torch.mm(rows, inputs.gate_up_proj[expert.number].T, out=gate)
        hidden = run_gates_forward(gate, activation).mul_(expert.weights)  # [n, F]
        output.index_add_(0, expert.tokens, (hidden @ inputs.down_proj[expert.number].T).to(output.dtype))
    return output.to(inputs.x.dtype), gates


def _run_backward(
    grad: Tensor,
    inputs: _Inputs,
    gates: Tensor,
    order: Tensor,
    ends: Tensor,
    activation: Activation,
    needed: list[bool],
) -> list[Tensor]:
    """The gradients of the first five tensors; those of experts that are not needed are empty."""
    in_groups = has_pair_kernels(inputs.x.device, inputs.x.dtype) or _are_few(inputs)
    run = _run_backward_in_groups if in_groups else _run_backward_one_by_one
    return run(grad, inputs, gates, Pairs(order, ends), activation, needed)


def _run_backward_in_groups(
    grad: Tensor, inputs: _Inputs, gates: Tensor, pairs: Pairs, activation: Activation, needed: list[bool]
) -> list[Tensor]:
    order, offs = pairs.order, pairs.ends
    gate_up_proj, down_proj = inputs.gate_up_proj, inputs.down_proj
    grad_outputs = grad.index_select(0, order // inputs.index.shape[1])  # [M, D], not weighted
    grad_hidden = F.grouped_mm(grad_outputs, down_proj, offs=offs)  # [M, F]
    weights = inputs.weights.flatten()[order, None]  # [M, 1]
    hidden, grad_gates, dots = run_weighted_gates_backward(gates, grad_hidden, weights, activation)
    del grad_hidden  # here and below, what was used makes room: each is as large as what is kept for this pass
    grad_down = F.grouped_mm(grad_outputs.mT, hidden, offs=offs) if needed[3] else grad.new_empty(0)  # [E, D, F]
    del grad_outputs, hidden
    grad_gate_up = grad.new_empty(0)
    if needed[2]:
        grad_gate_up = F.grouped_mm(grad_gates.mT, mix_pairs(inputs.mixing, order), offs=offs)  # [E, 2F, D]
    grad_rows = F.grouped_mm(grad_gates, gate_up_proj, offs=offs)  # [M, D]
    del grad_gates
    grad_mixing = dot_pairs(grad_rows, inputs.mixing, order)  # [S, K]
    grad_x = sum_pairs(grad_rows, inputs.mixing_weights, order)  # [S, D]
    return [grad_x, _restore_order(dots, inputs.weights, order), grad_gate_up, grad_down, grad_mixing]


def _run_backward_one_by_one(
    grad: Tensor, inputs: _Inputs, gates: Tensor, pairs: Pairs, activation: Activation, needed: list[bool]
) -> list[Tensor]:
    gate_up_proj, down_proj = inputs.gate_up_proj, inputs.down_proj
    grad_x, dots, mixing_dots = _new_sums(inputs.x), *inputs.weights.new_empty(2, len(pairs.order))
    grad_gate_up, grad_down = (
        _new_gradient(value, pairs) if wanted else value.new_empty(0)
        for value, wanted in zip((gate_up_proj, down_proj), needed[2:4], strict=True)
    )
    for expert in _select_experts(inputs, pairs):
        own = expert.pairs
        grad_outputs = grad.index_select(0, expert.tokens)  # [n, D], not weighted
        grad_hidden = grad_outputs @ down_proj[expert.number]  # [n, F]
        hidden, grad_gates, dots[own] = run_weighted_gates_backward(
            gates[own], grad_hidden, expert.weights, activation
        )
        means = _find_means(inputs, expert)  # [n, D]
        differences = inputs.x.index_select(0, expert.tokens).to(means.dtype).sub_(means)  # [n, D]
        rows = means.addcmul_(differences, expert.mixing_weights.to(means.dtype)).to(grad.dtype)  # [n, D]
        grad_rows = grad_gates @ gate_up_proj[expert.number]  # [n, D]
        if needed[3]:
            torch.mm(grad_outputs.T, hidden, out=grad_down[expert.number])
        if needed[2]:
            torch.mm(grad_gates.T, rows, out=grad_gate_up[expert.number])
        mixing_dots[own] = torch.linalg.vecdot(grad_rows.to(differences.dtype), differences)
        grad_x.index_add_(0, expert.tokens, grad_rows * expert.mixing_weights)
    grad_weights, grad_mixing = (_restore_order(values, inputs.weights, pairs.order) for values in (dots, mixing_dots))
    return [grad_x.to(grad.dtype), grad_weights, grad_gate_up, grad_down, grad_mixing]


class _Expert(NamedTuple):
    """An expert that was selected, and its pairs."""

    number: int
    pairs: slice
    tokens: Tensor  # [n]
    buckets: Tensor  # [n]
    weights: Tensor  # [n, 1]
    mixing_weights: Tensor  # [n, 1]


def _select_experts(inputs: _Inputs, pairs: Pairs) -> Iterator[_Expert]:
    tokens = pairs.order // inputs.index.shape[1]  # [M]
    weights = (value.flatten()[pairs.order, None] for value in (inputs.weights, inputs.mixing_weights))  # [M, 1]
    values = (tokens, inputs.buckets[tokens], *weights)
    for number, (start, end) in enumerate(pairwise([0, *pairs.ends.tolist()])):
        if end > start:
            yield _Expert(number, slice(start, end), *(value[start:end] for value in values))


def _find_means(inputs: _Inputs, expert: _Expert) -> Tensor:
    """What an expert expects `[n, D]` beside its tokens, in float32 at least: in bfloat16, 1 - w could be 0."""
    expected = inputs.mean_input[expert.number] + inputs.input_shift  # [P, D]
    wide = torch.promote_types(inputs.x.dtype, torch.float32)
    return expected.to(wide).index_select(0, expert.buckets)  # [n, D]


def _new_sums(x: Tensor) -> Tensor:
    return torch.zeros_like(
        x, dtype=torch.promote_types(x.dtype, torch.float32), memory_format=torch.contiguous_format
    )


def _new_gradient(value: Tensor, pairs: Pairs) -> Tensor:
    """Memory for the gradient of experts' weights, 0 for experts that no token selects."""
    result = torch.empty_like(value, memory_format=torch.contiguous_format)
    counts = pairs.ends.diff(prepend=pairs.ends.new_zeros(1))  # [E]
    result[counts == 0] = 0
    return result


def _restore_order(values: Tensor, like: Tensor, order: Tensor) -> Tensor:
    """Values `[M]` of sorted pairs as those of tokens `[S, K]`."""
    result = torch.empty_like(like, memory_format=torch.contiguous_format)
    result.view(-1)[order] = values
    return result


def _run_plain(inputs: _Inputs, pairs: Pairs, activation: Activation) -> Tensor:
    output = _new_sums(inputs.x)  # [S, D]
    for number, _, tokens, buckets, weights, mixing_weights in _select_experts(inputs, pairs):
        means = (inputs.mean_input[number] + inputs.input_shift[buckets]).to(output.dtype)  # [n, D]
        rows = means + mixing_weights * (inputs.x[tokens].to(means.dtype) - means)  # [n, D]
        hidden = run_gates(rows.to(inputs.x.dtype) @ inputs.gate_up_proj[number].T, activation)  # [n, F]
        output = output.index_add(0, tokens, (hidden @ inputs.down_proj[number].T * weights).to(output.dtype))
    return output.to(inputs.x.dtype)


@torch.library.custom_op("mot::mix_and_run_selected", mutates_args=())
def _mix_and_run_selected_op(inputs: list[Tensor], needs_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Opaque to compilers, which cannot express a loop that depends on the data.
    return _run(_Inputs(*inputs), nn.functional.silu, needs_grad)


@_mix_and_run_selected_op.register_fake
def _(inputs: list[Tensor], needs_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, _, gate_up_proj, _, _, index, *_ = inputs
    gates = x.new_empty(index.numel() if needs_grad else 0, gate_up_proj.shape[1])
    ends = index.new_empty(gate_up_proj.shape[0], dtype=torch.int32)
    return x.new_empty(x.shape), gates, index.new_empty(index.numel()), ends


@torch.library.custom_op("mot::mix_and_run_selected_backward", mutates_args=())
def _mix_and_run_selected_backward_op(
    grad: Tensor, inputs: list[Tensor], saved: list[Tensor], needed: list[bool]
) -> list[Tensor]:
    return _run_backward(grad, _Inputs(*inputs), *saved, nn.functional.silu, needed)


@_mix_and_run_selected_backward_op.register_fake
def _(grad: Tensor, inputs: list[Tensor], saved: list[Tensor], needed: list[bool]) -> list[Tensor]:
    of_tensors = [value.new_empty(value.shape) for value in inputs[:_NUM_DIFFERENTIABLE]]
    for place in (2, 3):
        if not needed[place]:
            of_tensors[place] = grad.new_empty(0)
    return of_tensors


__all__ = ["OwnMixtures", "can_run_selected", "copy_and_run", "mix_and_run_selected"]
