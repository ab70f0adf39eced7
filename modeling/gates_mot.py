"""The experts' nonlinearity and its derivative: gates and values `[..., 2F]` to hidden features `[..., F]`.

For SiLU on a GPU each is one kernel, written in Triton, in place of fourteen passes over memory.

Axes: M rows of gates and values, F expert width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.utils.import_utils import is_triton_available

from .mixing_kernels_mot import on_device_of

Activation = Callable[[Tensor], Tensor]

_BLOCK = 1024
# Elements of rows whose dot products are computed at once, of which there are three copies in float32.
_DOT_ELEMENTS = 2**24


def run_gates(gates: Tensor, activation: Activation) -> Tensor:
    """Hidden features of gates and values, by torch's own operations.

    Args:
        gates (`torch.Tensor` of shape `[..., 2F]`): Gates, and behind them values.
        activation (`Callable`): Activation of the gates.

    Returns:
        `torch.Tensor` of shape `[..., F]`: Activated gates times values.
    """
    gate, value = gates.chunk(2, dim=-1)  # [..., F]
    return activation(gate) * value


def run_gates_forward(gates: Tensor, activation: Activation) -> Tensor:
    """The same as [`run_gates`], for contiguous gates and without a derivative."""
    if not has_kernel(gates, activation):
        return run_gates(gates, activation)
    hidden = gates.new_empty(*gates.shape[:-1], gates.shape[-1] // 2)  # [..., F]
    _launch(_forward_kernel, gates, hidden)
    return hidden


def run_gates_backward(gates: Tensor, grad_hidden: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """Hidden features and the gradients of gates and values, all of them contiguous.

    Args:
        gates (`torch.Tensor` of shape `[..., 2F]`): Gates and values.
        grad_hidden (`torch.Tensor` of shape `[..., F]`): Gradients of the hidden features.
        activation (`Callable`): Activation of the gates.

    Returns:
        `tuple(torch.Tensor)`: Hidden features `[..., F]`, and gradients `[..., 2F]`.
    """
    if has_kernel(gates, activation):
        hidden, grad_gates = torch.empty_like(grad_hidden), torch.empty_like(gates)  # [..., F], [..., 2F]
        _launch(_backward_kernel, gates, grad_hidden, hidden, grad_gates)
        return hidden, grad_gates
    if is_silu(activation):
        return _run_silu_backward(gates, grad_hidden)
    with torch.enable_grad():
        leaf = gates.detach().requires_grad_()
        hidden = run_gates(leaf, activation)  # [..., F]
    (grad_gates,) = torch.autograd.grad(hidden, leaf, grad_hidden)  # [..., 2F]
    return hidden.detach(), grad_gates


def run_weighted_gates_backward(
    gates: Tensor, grad_hidden: Tensor, weights: Tensor, activation: Activation
) -> tuple[Tensor, Tensor, Tensor]:
    """The same as [`run_gates_backward`] where hidden features are weighted after the activation.

    Args:
        gates (`torch.Tensor` of shape `[M, 2F]`): Gates and values.
        grad_hidden (`torch.Tensor` of shape `[M, F]`): Gradients of the weighted hidden features.
        weights (`torch.Tensor` of shape `[M, 1]`): The weights, in float32 at least.
        activation (`Callable`): Activation of the gates.

    Returns:
        `tuple(torch.Tensor)`: Weighted hidden features `[M, F]`, gradients of the gates `[M, 2F]`, and of the weights
        `[M]`.
    """
    hidden, grad_gates = run_gates_backward(gates, grad_hidden, activation)  # [M, F], [M, 2F]
    dots = _dot_rows(grad_hidden, hidden, torch.promote_types(hidden.dtype, weights.dtype))  # [M]
    return hidden.mul_(weights), grad_gates.mul_(weights), dots


def _dot_rows(first: Tensor, second: Tensor, dtype: torch.dtype) -> Tensor:
    """Dot products `[M]` of rows `[M, F]` in a wider dtype, part by part."""
    result = first.new_empty(len(first), dtype=dtype)
    length = max(1, _DOT_ELEMENTS // first.shape[1])
    for one, other, own in zip(first.split(length), second.split(length), result.split(length), strict=True):
        torch.linalg.vecdot(one.to(dtype), other.to(dtype), out=own)
    return result


def _run_silu_backward(gates: Tensor, grad_hidden: Tensor) -> tuple[Tensor, Tensor]:
    # Not by autograd, which an operator of a graph cannot use, and which would copy both gradients into one tensor.
    grad_gates = torch.empty_like(gates)  # [..., 2F]
    (gate, value), (grad_gate, grad_value) = gates.chunk(2, dim=-1), grad_gates.chunk(2, dim=-1)  # [..., F]
    activated = nn.functional.silu(gate)  # [..., F]
    torch.mul(grad_hidden, activated, out=grad_value)
    torch.ops.aten.silu_backward.grad_input(grad_hidden * value, gate, grad_input=grad_gate)
    return activated.mul_(value), grad_gates


def is_silu(activation: Activation) -> bool:
    """Whether an activation is SiLU, for which there are kernels."""
    return activation is nn.functional.silu or isinstance(activation, (nn.SiLU, SiLUActivation))


def has_kernel(gates: Tensor, activation: Activation) -> bool:
    """Whether these gates run in a kernel."""
    return gates.is_cuda and gates.dtype != torch.float64 and is_triton_available() and is_silu(activation)


if is_triton_available():
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]

    @triton.jit
    def _forward_kernel(gates, hidden, num_features, block: tl.constexpr):  # noqa: ANN001, ANN202
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * block + tl.arange(0, block)
        inside = column < num_features
        gates += row * 2 * num_features + column
        gate = tl.load(gates, mask=inside).to(tl.float32)
        value = tl.load(gates + num_features, mask=inside).to(tl.float32)
        result = gate * tl.sigmoid(gate) * value
        tl.store(hidden + row * num_features + column, result.to(hidden.dtype.element_ty), mask=inside)

    @triton.jit
    def _backward_kernel(gates, grad_hidden, hidden, grad_gates, num_features, block: tl.constexpr):  # noqa: ANN001, ANN202
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * block + tl.arange(0, block)
        inside = column < num_features
        gates += row * 2 * num_features + column
        grad_gates += row * 2 * num_features + column
        gate = tl.load(gates, mask=inside).to(tl.float32)
        value = tl.load(gates + num_features, mask=inside).to(tl.float32)
        grad = tl.load(grad_hidden + row * num_features + column, mask=inside).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        activated = gate * sigmoid
        dtype = hidden.dtype.element_ty
        tl.store(hidden + row * num_features + column, (activated * value).to(dtype), mask=inside)
        slope = sigmoid + activated * (1 - sigmoid)
        tl.store(grad_gates, (grad * value * slope).to(dtype), mask=inside)
        tl.store(grad_gates + num_features, (grad * activated).to(dtype), mask=inside)

    def _launch(kernel, *tensors: Tensor) -> None:  # noqa: ANN001
        num_features = tensors[0].shape[-1] // 2
        num_rows = tensors[0].numel() // tensors[0].shape[-1]
        block = min(_BLOCK, triton.next_power_of_2(num_features))
        with on_device_of(tensors[0]):
            kernel[(num_rows, triton.cdiv(num_features, block))](*tensors, num_features, block=block)


__all__ = ["is_silu", "run_gates", "run_gates_backward", "run_gates_forward", "run_weighted_gates_backward"]
