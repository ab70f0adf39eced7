"""Products of a MoT layer on groups of rows as they lie in memory: no group is copied for them.

Axes: A groups of rows, G tokens of a group, H rows of a group (G, or G + 1 with one for absent tokens), T columns,
N = A * T groups of tokens, E experts, D model width, R ranges of groups.
"""

import torch
from torch import Tensor
from transformers.utils.import_utils import is_tracing

from .mixing_kernels_mot import has_mixing_kernels, run_mix, run_products

# All integers up to it are bfloat16 numbers.
_LARGEST_EXACT = 256


def fit_grouped_mm(*weights: Tensor) -> bool:
    """Whether `grouped_mm` takes weights `[E, ..., ...]`: rows of multiples of 16 bytes, without gaps in them."""
    return all(
        weight.stride(-1) == 1
        and all(size * weight.element_size() % 16 == 0 for size in (*weight.stride()[:-1], weight.shape[-1]))
        for weight in weights
    )


def new_rows(rows: Tensor) -> Tensor:
    """New memory for rows `[A, H, T, D]`, on a CPU in the order of groups."""
    num_rows, num_columns, width = rows.shape[1:]
    if rows.device.type == "cpu":  # by strides: a transposed tensor would be a view, which no hook may change in place
        strides = (num_columns * num_rows * width, width, num_rows * width, 1)
        return rows.new_empty_strided(rows.shape, strides)
    return rows.new_empty(rows.shape)


def mix(x: Tensor, weights: Tensor, mean_input: Tensor | None = None, part: slice = slice(None)) -> Tensor:
    """Mixtures `[E, N, D]` of rows `[A, H, T, D]` by weights `[A, H, T, E]`; in memory ordered by groups."""
    if has_mixing_kernels(x, weights):
        return run_mix(x, weights, None if mean_input is None else mean_input[part])
    num_groups, _, num_columns, width = x.shape
    mixture = x.new_empty(num_groups, num_columns, weights.shape[-1], width)  # [A, T, E, D]
    for own, w, rows in zip(mixture, weights, x, strict=True):
        torch.bmm(w.permute(1, 2, 0), rows.transpose(0, 1), out=own)
    if mean_input is not None:
        mixture.addcmul_(weights[:, -1, :, :, None], mean_input[part])
    return mixture.flatten(0, 1).transpose(0, 1)


def mix_backward(
    grad_rows: Tensor,
    x: Tensor,
    weights: Tensor,
    mean_input: Tensor | None,
    grad_x: Tensor | None,
    grad_weights: Tensor | None,
    adds: bool,
) -> None:
    """Turn gradients `[E, N, D]` of mixtures into those of rows and weights, see [`mix`].

    Args:
        grad_rows (`torch.Tensor` of shape `[E, N, D]`): The gradients of mixtures.
        x (`torch.Tensor` of shape `[A, H, T, D]`): The rows.
        weights (`torch.Tensor` of shape `[A, H, T, E]`): The mixing weights.
        mean_input (`torch.Tensor` of shape `[E, D]`, *optional*): What an expert adds to the last row.
        grad_x (`torch.Tensor` of shape `[A, H, T, D]`, *optional*): Where to write, or add, the gradient of `x`.
        grad_weights (`torch.Tensor` of shape `[A, H, T, E]`, *optional*): Where to add the gradient of `weights`.
        adds (`bool`): Whether to add to `grad_x`.
    """
    if has_mixing_kernels(x, weights):
        run_products(grad_rows, x, weights, mean_input, grad_x, grad_weights, adds_result=adds, adds_dots=True)
        return
    if grad_x is not None:
        hand_back(grad_x, weights, grad_rows, adds)
    if grad_weights is None:
        return
    dot(grad_weights, x, grad_rows, adds=True)
    if mean_input is not None:
        dots = torch.bmm(grad_rows, mean_input[:, :, None])[..., 0].T  # [N, E]
        grad_weights[:, -1] += dots.unflatten(0, (len(x), x.shape[2]))


def hand_back(result: Tensor, weights: Tensor, outputs: Tensor, adds: bool = False) -> None:
    """Write, or add, outputs `[E, N, D]` times weights `[A, G, T, E]` to rows `[A, G, T, D]`."""
    if has_mixing_kernels(result, weights):
        run_products(outputs, result, weights, result=result, adds_result=adds)
        return
    by_row_group = outputs.transpose(0, 1).unflatten(0, (len(result), -1))  # [A, T, E, D]
    for rows, w, own in zip(result, weights, by_row_group, strict=True):
        multiply_into(rows.transpose(0, 1), w.transpose(0, 1), own, adds)


def dot(result: Tensor, rows: Tensor, outputs: Tensor, adds: bool = False) -> None:
    """Write, or add, to `[A, H, T, E]` the products of rows `[A, H, T, D]` with their groups' outputs `[E, N, D]`."""
    if has_mixing_kernels(rows, result):
        run_products(outputs, rows, result, dots=result, adds_dots=adds)
        return
    by_row_group = outputs.transpose(0, 1).unflatten(0, (len(result), -1))  # [A, T, E, D]
    for dots, own_rows, own in zip(result, rows, by_row_group, strict=True):
        multiply_into(dots.transpose(0, 1), own_rows.transpose(0, 1), own.mT, adds)


def multiply_into(result: Tensor, left: Tensor, right: Tensor, adds: bool = False) -> None:
    """Write, or add, a batch of products to `result`."""
    if result.device.type == "cpu" and not result.is_contiguous():
        # A CPU would multiply into such memory matrix by matrix.
        product = torch.bmm(left, right)
        result.add_(product) if adds else result.copy_(product)
    elif adds:
        torch.baddbmm(result, left, right, out=result)
    else:
        torch.bmm(left, right, out=result)


def has_wide_products(rows: Tensor) -> bool:
    """Whether the device multiplies rows of half precision into float32: CUDA does, but not ROCm."""
    return rows.is_cuda and torch.version.hip is None and rows.dtype in (torch.float16, torch.bfloat16)


def multiply_in_float32(counts: Tensor, rows: Tensor, group_size: int, out: Tensor | None = None) -> Tensor:
    """Counts `[E, R, N]`, up to the group size, times rows `[E, N, D]`, in float32 whatever the rows are."""
    if has_wide_products(rows) and group_size <= _LARGEST_EXACT and not is_tracing(rows):
        return torch.bmm(counts.to(rows.dtype), rows, out_dtype=torch.float32, out=out)
    return torch.bmm(counts, rows.float(), out=out)


__all__ = [
    "dot",
    "hand_back",
    "has_wide_products",
    "mix",
    "mix_backward",
    "multiply_in_float32",
    "multiply_into",
    "new_rows",
]
