"""Mixing and its derivative on a GPU with one pass over memory each, written in Triton.

Mixing multiplies `[E, G]` by `[G, D]` for every group of tokens. The libraries' kernels take a launch for each group
of rows, read the tokens again for each part of the experts, and read the mixtures' gradients twice.

Axes: A groups of rows, G tokens of a group, H rows of a group (G, or G + 1 with one for absent tokens), T columns,
N = A * T groups of tokens, E experts, D model width. A kernel's arguments `x_a`, `x_h`, `x_t` are strides of `x`.
"""

# ruff: noqa: ANN001, ANN202 (a kernel's arguments are pointers and numbers)

import torch
from torch import Tensor
from transformers.utils.import_utils import is_triton_available

# A program holds all tokens of a group in registers.
_MAX_ROWS = 65
_BLOCK_E, _BLOCK_D = 64, 128


def has_mixing_kernels(rows: Tensor, weights: Tensor) -> bool:
    """Whether rows `[A, H, T, D]` and weights `[A, H, T, E]` are multiplied in a kernel."""
    if not rows.is_cuda or rows.dtype not in (torch.float16, torch.bfloat16) or rows.shape[1] > _MAX_ROWS:
        return False
    return rows.stride(-1) == 1 and weights.stride(-1) == 1 and is_triton_available()


if is_triton_available():
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]

    @triton.jit
    def _load(pointers, rows_inside, columns_inside):
        return tl.load(pointers, mask=rows_inside[:, None] & columns_inside[None, :], other=0.0)

    @triton.jit
    def _store(pointers, values, rows_inside, columns_inside):
        values = values.to(pointers.dtype.element_ty)
        tl.store(pointers, values, mask=rows_inside[:, None] & columns_inside[None, :])

    @triton.jit
    def _mix_kernel(
        x,
        weights,
        mean_input,
        mixtures,
        x_a,
        x_h,
        x_t,
        w_a,
        w_h,
        w_t,
        num_columns,
        num_rows,
        num_experts: tl.constexpr,
        width: tl.constexpr,
        has_mean_input: tl.constexpr,
        block_h: tl.constexpr,
        block_e: tl.constexpr,
        block_d: tl.constexpr,
    ):
        num_blocks = tl.cdiv(width, block_d)
        n = (tl.program_id(0) // num_blocks).to(tl.int64)
        x += n // num_columns * x_a + n % num_columns * x_t
        weights += n // num_columns * w_a + n % num_columns * w_t
        mixtures += n * num_experts * width
        h = tl.arange(0, block_h)
        d = tl.program_id(0) % num_blocks * block_d + tl.arange(0, block_d)
        in_h, in_d = h < num_rows, d < width
        rows = _load(x + h[:, None] * x_h + d[None, :], in_h, in_d)  # [H, D]
        for first in range(0, num_experts, block_e):
            e = first + tl.arange(0, block_e)
            in_e = e < num_experts
            mixture = tl.dot(_load(weights + h[None, :] * w_h + e[:, None], in_e, in_h), rows)  # [E, D]
            if has_mean_input:
                w = tl.load(weights + (num_rows - 1) * w_h + e, mask=in_e, other=0.0)  # [E]
                own = _load(mean_input + e[:, None] * width + d[None, :], in_e, in_d)  # [E, D]
                mixture += w[:, None].to(tl.float32) * own.to(tl.float32)
            _store(mixtures + e[:, None] * width + d[None, :], mixture, in_e, in_d)

    @triton.jit
    def _products_kernel(
        outputs,
        rows,
        weights,
        mean_input,
        result,
        dots,
        o_e,
        o_n,
        x_a,
        x_h,
        x_t,
        w_a,
        w_h,
        w_t,
        r_a,
        r_h,
        r_t,
        d_a,
        d_h,
        d_t,
        num_columns,
        num_rows,
        num_experts: tl.constexpr,
        width: tl.constexpr,
        has_result: tl.constexpr,
        has_dots: tl.constexpr,
        has_mean_input: tl.constexpr,
        adds_result: tl.constexpr,
        adds_dots: tl.constexpr,
        block_h: tl.constexpr,
        block_e: tl.constexpr,
        block_d: tl.constexpr,
    ):
        n = tl.program_id(0).to(tl.int64)
        a, t = n // num_columns, n % num_columns
        outputs += n * o_n
        rows += a * x_a + t * x_t
        weights += a * w_a + t * w_t
        result += a * r_a + t * r_t
        dots += a * d_a + t * d_t
        h = tl.arange(0, block_h)
        in_h = h < num_rows
        for first in tl.static_range(0, num_experts, block_e):
            e = first + tl.arange(0, block_e)
            in_e = e < num_experts
            dots_at = dots + h[:, None] * d_h + e[None, :]
            sums = tl.zeros([block_h, block_e], tl.float32)
            if adds_dots:
                sums += _load(dots_at, in_h, in_e).to(tl.float32)
            if has_result:
                w = _load(weights + h[:, None] * w_h + e[None, :], in_h, in_e)  # [H, E]
            for start in range(0, width, block_d):
                d = start + tl.arange(0, block_d)
                in_d = d < width
                own = _load(outputs + e[:, None] * o_e + d[None, :], in_e, in_d)  # [E, D]
                if has_dots:
                    sums = tl.dot(_load(rows + h[:, None] * x_h + d[None, :], in_h, in_d), tl.trans(own), acc=sums)
                if has_mean_input:
                    absent = _load(mean_input + e[:, None] * width + d[None, :], in_e, in_d)  # [E, D]
                    absent_dots = tl.sum(own.to(tl.float32) * absent.to(tl.float32), axis=1)  # [E]
                    sums += tl.where(h[:, None] == num_rows - 1, absent_dots[None, :], 0.0)  # [H, E]
                if has_result:
                    product = tl.dot(w, own)  # [H, D]
                    at = result + h[:, None] * r_h + d[None, :]
                    if adds_result or first > 0:
                        product += _load(at, in_h, in_d).to(tl.float32)
                    _store(at, product, in_h, in_d)
            if has_dots:
                _store(dots_at, sums, in_h, in_e)


def run_mix(x: Tensor, weights: Tensor, mean_input: Tensor | None) -> Tensor:
    """Mixtures `[E, N, D]`, in memory ordered by groups, of rows `[A, H, T, D]` by weights `[A, H, T, E]`."""
    num_row_groups, num_rows, num_columns, width = x.shape
    num_experts = weights.shape[-1]
    mixtures = x.new_empty(num_row_groups * num_columns, num_experts, width)  # [N, E, D]
    tensors = (x, weights, x if mean_input is None else mean_input, mixtures)
    strides = (*x.stride()[:3], *weights.stride()[:3])
    with on_device_of(x):
        grid = (len(mixtures) * triton.cdiv(width, _BLOCK_D),)
        _mix_kernel[grid](  # pyright: ignore[reportIndexIssue]
            *tensors,
            *strides,
            num_columns,
            num_rows,
            num_experts,
            width,
            has_mean_input=mean_input is not None,
            **_choose_blocks(num_rows),
        )
    return mixtures.transpose(0, 1)


def run_products(
    outputs: Tensor,
    rows: Tensor,
    weights: Tensor,
    mean_input: Tensor | None = None,
    result: Tensor | None = None,
    dots: Tensor | None = None,
    adds_result: bool = False,
    adds_dots: bool = False,
) -> None:
    """Multiply every group's outputs by weights, by rows, or by both.

    Args:
        outputs (`torch.Tensor` of shape `[E, N, D]`): Outputs of the experts, or their gradients.
        rows (`torch.Tensor` of shape `[A, H, T, D]`): Rows; only read for `dots`.
        weights (`torch.Tensor` of shape `[A, H, T, E]`): Weights; only read for `result`.
        mean_input (`torch.Tensor` of shape `[E, D]`, *optional*): What an expert adds to the last row of `rows`.
        result (`torch.Tensor` of shape `[A, H, T, D]`, *optional*): Where to write outputs times weights.
        dots (`torch.Tensor` of shape `[A, H, T, E]`, *optional*): Where to write outputs times rows.
        adds_result (`bool`, defaults to `False`): Whether to add to `result`.
        adds_dots (`bool`, defaults to `False`): Whether to add to `dots`.
    """
    num_row_groups, num_rows, num_columns, width = rows.shape
    used = (rows, weights, rows if result is None else result, weights if dots is None else dots)
    with on_device_of(rows):
        grid = (num_row_groups * num_columns,)
        _products_kernel[grid](  # pyright: ignore[reportIndexIssue]
            outputs,
            *used[:2],
            rows if mean_input is None else mean_input,
            *used[2:],
            *outputs.stride()[:2],
            *(stride for value in used for stride in value.stride()[:3]),
            num_columns,
            num_rows,
            len(outputs),
            width,
            has_result=result is not None,
            has_dots=dots is not None,
            has_mean_input=mean_input is not None and dots is not None,
            adds_result=adds_result,
            adds_dots=adds_dots,
            **_choose_blocks(num_rows),
        )


def on_device_of(tensor: Tensor) -> torch.cuda.device:
    """A context for launches: Triton launches on the current device."""
    # A CPU, on which Triton's interpreter runs, has index None.
    return torch.cuda.device(-1 if tensor.device.index is None else tensor.device.index)


def _choose_blocks(num_rows: int) -> dict[str, int]:
    # A tensor core multiplies at least 16 rows.
    return {"block_h": max(16, triton.next_power_of_2(num_rows)), "block_e": _BLOCK_E, "block_d": _BLOCK_D}


__all__ = ["has_mixing_kernels", "on_device_of", "run_mix", "run_products"]
