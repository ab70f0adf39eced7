"""Pairs of a token and an expert that it selects: their order by expert, their mixtures, sums over a token's pairs.

On a GPU each is one kernel, written in Triton: in torch's own operations, which a CPU uses, mixtures in float32 would
take many passes over memory, and the gradient of a copied row would sort.

Axes: S tokens, E experts, K experts per token, M = S * K pairs, n pairs of one expert, D model width, P position
buckets.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers.utils.import_utils import is_triton_available

from .mixing_kernels_mot import on_device_of

_BLOCK = 1024
# Not asked for in a graph, where the search for a package would break it.
_HAS_TRITON = is_triton_available()


class Pairs(NamedTuple):
    """Pairs of a token and an expert, ordered by expert.

    Args:
        order (`torch.Tensor` of shape `[M]`): Number t * K + k of every pair, the kth of token t.
        ends (`torch.Tensor` of shape `[E]`): Number of pairs of every expert and those before it; int32.
    """

    order: Tensor
    ends: Tensor


class Mixing(NamedTuple):
    """What the mixtures of pairs are made of.

    Args:
        x (`torch.Tensor` of shape `[S, D]`): The tokens.
        weights (`torch.Tensor` of shape `[S, K]`): Mixing weights of the tokens, float32.
        index (`torch.Tensor` of shape `[S, K]`): The experts that a token selects.
        buckets (`torch.Tensor` of shape `[S]`): Position bucket of every token.
        mean_input (`torch.Tensor` of shape `[E, D]`): What an expert is given instead of a token; float32.
        input_shift (`torch.Tensor` of shape `[P, D]`): How that differs in a position bucket; float32.
    """

    x: Tensor
    weights: Tensor
    index: Tensor
    buckets: Tensor
    mean_input: Tensor
    input_shift: Tensor


def sort_pairs(index: Tensor, num_experts: int) -> Pairs:
    """Order the pairs of `index` `[S, K]` by expert, those of one expert by token."""
    experts, order = index.flatten().sort(stable=True)  # [M]
    numbers = torch.arange(num_experts, device=index.device)  # [E]
    return Pairs(order, torch.searchsorted(experts, numbers, right=True, out_int32=True))


def mix_pairs(mixing: Mixing, order: Tensor) -> Tensor:
    """Mixtures `[M, D]` of pairs."""
    if mixing.x.is_cuda:
        return mix_in_kernel(mixing, order)
    tokens, means = _find_rows(mixing, order)  # [M, D]
    return means.lerp_(tokens, mixing.weights.flatten()[order, None]).to(mixing.x.dtype)


def mix_in_kernel(mixing: Mixing, order: Tensor) -> Tensor:
    """The same, in a kernel."""
    x, weights, index, *means = (value.contiguous() for value in mixing)
    rows = x.new_empty(len(order), x.shape[1])  # [M, D]
    grid = (len(rows), -(-rows.shape[1] // _find_block(rows.shape[1])))
    _launch(_mix_kernel, grid, x, weights, order, index, *means, rows, rows.shape[1], index.shape[1])
    return rows


def sum_pairs(values: Tensor, weights: Tensor, order: Tensor) -> Tensor:
    """Sums `[S, D]` of the values `[M, D]` of a token's pairs by weights `[S, K]`, added in float32."""
    if values.is_cuda:
        return sum_in_kernel(values, weights, order)
    by_token = torch.empty_like(values).index_copy_(0, order, values).unflatten(0, weights.shape)  # [S, K, D]
    sums = weights[:, None].float() @ by_token.float()  # [S, 1, D]
    return sums.to(values.dtype).squeeze(1).clone()  # a view would not let a hook change it in place


def sum_in_kernel(values: Tensor, weights: Tensor, order: Tensor) -> Tensor:
    """The same, in a kernel."""
    places = torch.empty_like(order)  # [M]
    places[order] = torch.arange(len(order), device=order.device)
    result = values.new_empty(len(weights), values.shape[1])  # [S, D]
    grid = (len(result), -(-result.shape[1] // _find_block(result.shape[1])))
    tensors = (values.contiguous(), weights.contiguous(), places, result)
    _launch(_sum_kernel, grid, *tensors, result.shape[1], weights.shape[1])
    return result


def dot_pairs(grad_rows: Tensor, mixing: Mixing, order: Tensor) -> Tensor:
    """Gradients `[S, K]` of the mixing weights from those of the mixtures `[M, D]`."""
    if grad_rows.is_cuda:
        return dot_in_kernel(grad_rows, mixing, order)
    tokens, means = _find_rows(mixing, order)  # [M, D]
    dots = mixing.weights.new_empty(mixing.weights.shape)  # [S, K]
    dots.view(-1)[order] = torch.linalg.vecdot(grad_rows.float(), tokens.sub_(means)).to(dots.dtype)
    return dots


def dot_in_kernel(grad_rows: Tensor, mixing: Mixing, order: Tensor) -> Tensor:
    """The same, in a kernel."""
    x, weights, index, *means = (value.contiguous() for value in mixing)
    dots = torch.empty_like(weights)  # [S, K]
    _launch(_dot_kernel, (len(order), 1), grad_rows, x, order, index, *means, dots, x.shape[1], index.shape[1])
    return dots


def _find_rows(mixing: Mixing, order: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of pairs, and what their experts expect beside them, both `[M, D]`, in float32."""
    tokens = order // mixing.index.shape[1]  # [M]
    means = mixing.mean_input.index_select(0, mixing.index.flatten()[order])  # [M, D]
    means += mixing.input_shift.index_select(0, mixing.buckets[tokens])
    return mixing.x.index_select(0, tokens).float(), means


def _find_block(width: int) -> int:
    """Columns that a program works on at once, a power of 2."""
    return min(_BLOCK, 1 << (width - 1).bit_length())


def has_pair_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether tokens run in kernels: where torch multiplies groups of rows without a look at their numbers."""
    if device.type != "cuda" or dtype != torch.bfloat16 or not _HAS_TRITON:
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


if is_triton_available():
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]

    @triton.jit
    def _load_means(pair, column, inside, index, buckets, mean_input, input_shift, width, k):  # noqa: ANN001, ANN202
        expert = tl.load(index + pair).to(tl.int64)
        bucket = tl.load(buckets + pair // k).to(tl.int64)
        mean = tl.load(mean_input + expert * width + column, mask=inside, other=0.0)
        return mean + tl.load(input_shift + bucket * width + column, mask=inside, other=0.0)

    @triton.jit
    def _mix_kernel(x, weights, order, index, buckets, mean_input, input_shift, rows, width, k, block: tl.constexpr):  # noqa: ANN001, ANN202
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * block + tl.arange(0, block)
        inside = column < width
        pair = tl.load(order + row)
        mean = _load_means(pair, column, inside, index, buckets, mean_input, input_shift, width, k)
        token = tl.load(x + pair // k * width + column, mask=inside, other=0.0).to(tl.float32)
        result = mean + tl.load(weights + pair) * (token - mean)
        tl.store(rows + row * width + column, result.to(rows.dtype.element_ty), mask=inside)

    @triton.jit
    def _sum_kernel(values, weights, places, result, width, k, block: tl.constexpr):  # noqa: ANN001, ANN202
        token = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * block + tl.arange(0, block)
        inside = column < width
        total = tl.zeros((block,), dtype=tl.float32)
        for pair in range(token * k, (token + 1) * k):
            value = tl.load(values + tl.load(places + pair) * width + column, mask=inside, other=0.0)
            total += tl.load(weights + pair) * value.to(tl.float32)
        tl.store(result + token * width + column, total.to(result.dtype.element_ty), mask=inside)

    @triton.jit
    def _dot_kernel(grad_rows, x, order, index, buckets, mean_input, input_shift, dots, width, k, block: tl.constexpr):  # noqa: ANN001, ANN202
        row = tl.program_id(0).to(tl.int64)
        pair = tl.load(order + row)
        total = tl.zeros((block,), dtype=tl.float32)
        for start in range(0, width, block):
            column = start + tl.arange(0, block)
            inside = column < width
            mean = _load_means(pair, column, inside, index, buckets, mean_input, input_shift, width, k)
            token = tl.load(x + pair // k * width + column, mask=inside, other=0.0).to(tl.float32)
            grad = tl.load(grad_rows + row * width + column, mask=inside, other=0.0).to(tl.float32)
            total += grad * (token - mean)
        tl.store(dots + pair, tl.sum(total, axis=0))

    def _launch(kernel, grid: tuple[int, int], first: Tensor, *others: Tensor | int) -> None:  # noqa: ANN001
        with on_device_of(first):
            kernel[grid](first, *others, block=_find_block(first.shape[1]))


__all__ = [
    "Mixing",
    "Pairs",
    "dot_in_kernel",
    "dot_pairs",
    "has_pair_kernels",
    "mix_in_kernel",
    "mix_pairs",
    "sort_pairs",
    "sum_in_kernel",
    "sum_pairs",
]
