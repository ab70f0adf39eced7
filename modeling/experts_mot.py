"""Every expert of a MoT layer on its own rows of a slab, as batched matrix products.

Axes: E experts, N rows of an expert, D model width, F expert width, I inputs and O outputs of a linear map.
"""

from collections.abc import Callable
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from transformers.utils.import_utils import is_tracing

# Hidden features that a CPU works on at once, 2 MB in float32: what is computed from them is still in the cache when
# it is used, and in memory that is used again.
_CPU_FEATURES = 2**19


def run_slab(slab: Tensor, gate_up_proj: Tensor, down_proj: Tensor, apply_gate: Callable[[Tensor], Tensor]) -> Tensor:
    """Run every expert on its own rows.

    Its derivatives, of any order and however torch takes them, are those of the plain products.

    Args:
        slab (`torch.Tensor` of shape `[E, N, D]`): The rows.
        gate_up_proj (`torch.Tensor` of shape `[E, 2F, D]`): The experts' first weights.
        down_proj (`torch.Tensor` of shape `[E, D, F]`): Their last ones.
        apply_gate (`Callable`): Makes hidden features `[..., F]` of gates and values `[..., 2F]`.

    Returns:
        `torch.Tensor` of shape `[E, N, D]`: The outputs.
    """
    device_type = slab.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):  # of which torch knows nothing there
        dtype = torch.get_autocast_dtype(device_type)
        slab, gate_up_proj, down_proj = slab.to(dtype), gate_up_proj.to(dtype), down_proj.to(dtype)
    if _is_transformed(slab, gate_up_proj, down_proj):
        return _run_plainly(slab, gate_up_proj, down_proj, apply_gate)
    if device_type == "cpu" and not is_tracing(slab):
        return _SlabInParts.apply(slab, gate_up_proj, down_proj, apply_gate, torch.is_grad_enabled())
    hidden = apply_gate(_BatchedLinear.apply(slab, gate_up_proj))  # [E, N, F]
    return _BatchedLinear.apply(hidden, down_proj)  # [E, N, D]


def _run_plainly(
    slab: Tensor, gate_up_proj: Tensor, down_proj: Tensor, apply_gate: Callable[[Tensor], Tensor]
) -> Tensor:
    hidden = apply_gate(torch.bmm(slab, gate_up_proj.mT))  # [E, N, F]
    return torch.bmm(hidden, down_proj.mT)  # [E, N, D]


def _is_transformed(*values: Tensor) -> bool:
    """Whether `torch.func` or forward-mode differentiation is at work, which know torch's own operations only."""
    if torch._C._are_functorch_transforms_active():  # no public function tells
        return True
    return any(forward_ad.unpack_dual(value).tangent is not None for value in values)


class _BatchedLinear(torch.autograd.Function):
    """Rows `[E, N, I]` times weights `[E, O, I]`.

    `torch.bmm` gives the gradient of weights that it takes transposed a transposed layout, and autograd copies it into
    that of the weights. All experts' weights are large, compared with what few rows make of them.
    """

    @staticmethod
    def forward(rows: Tensor, weights: Tensor) -> Tensor:
        return torch.bmm(rows, weights.mT)  # [E, N, O]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (rows, weights) = grads, ctx.saved_tensors
        grad_rows = torch.bmm(grad, weights) if ctx.needs_input_grad[0] else None  # [E, N, I]
        grad_weights = torch.bmm(grad.mT, rows) if ctx.needs_input_grad[1] else None  # [E, O, I]
        return grad_rows, grad_weights


class _SlabInParts(torch.autograd.Function):
    """The same for a CPU: some experts after the others, which keeps nothing but gates and values for the backward.

    Fresh memory is slow to get on a CPU, and the hidden features of all experts do not fit its cache.
    """

    @staticmethod
    def forward(
        ctx: Any,
        slab: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        apply_gate: Callable[[Tensor], Tensor],
        keep: bool,
    ) -> Tensor:
        num_experts, num_rows, width = slab.shape
        num_features = gate_up_proj.shape[1]
        parts = _cut_experts(num_experts, num_rows * num_features)
        outputs = slab.new_empty(num_experts, num_rows, width)  # [E, N, D]
        gates = slab.new_empty(num_experts if keep else parts[0].stop, num_rows, num_features)  # [E, N, 2F]
        for part in parts:
            gate = gates[part] if keep else gates[: part.stop - part.start]
            torch.bmm(slab[part], gate_up_proj[part].mT, out=gate)
            torch.bmm(apply_gate(gate), down_proj[part].mT, out=outputs[part])
        if keep:
            ctx.save_for_backward(slab, gate_up_proj, down_proj, gates)
            ctx.apply_gate, ctx.parts = apply_gate, parts
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Legacy batches are those of `torch.autograd.grad(is_grads_batched=True)`.
        if torch.is_grad_enabled() or _is_transformed(*grads) or is_legacy_batchedtensor(grads[0]):
            return _SlabInParts._backward_plainly(ctx, *grads)
        (grad,), (slab, gate_up_proj, down_proj, gates) = grads, ctx.saved_tensors
        grad_slab, grad_gate_up, grad_down = (
            torch.empty_like(value, memory_format=torch.contiguous_format) if needed else None
            for value, needed in zip((slab, gate_up_proj, down_proj), ctx.needs_input_grad, strict=False)
        )
        for part in ctx.parts:
            with torch.enable_grad():
                gate = gates[part].detach().requires_grad_()
                hidden = ctx.apply_gate(gate)
            if grad_down is not None:
                torch.bmm(grad[part].mT, hidden.detach(), out=grad_down[part])
            (grad_gate,) = torch.autograd.grad(hidden, gate, torch.bmm(grad[part], down_proj[part]))
            if grad_gate_up is not None:
                torch.bmm(grad_gate.mT, slab[part], out=grad_gate_up[part])
            if grad_slab is not None:
                torch.bmm(grad_gate, gate_up_proj[part], out=grad_slab[part])
        return grad_slab, grad_gate_up, grad_down, None, None

    @staticmethod
    def _backward_plainly(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The same gradients, themselves differentiable where a graph of them is asked for."""
        create_graph, needed = torch.is_grad_enabled(), ctx.needs_input_grad[:3]
        with torch.enable_grad():
            # Views: an input may be computed from another one, whose gradient is not to pass through it here.
            inputs = [value.view_as(value) for value in ctx.saved_tensors[:3]]
            outputs = _run_plainly(*inputs, ctx.apply_gate)
        grads = iter(torch.autograd.grad(outputs, list(compress(inputs, needed)), grad, create_graph=create_graph))
        return *(next(grads) if wanted else None for wanted in needed), None, None


def _cut_experts(num_experts: int, num_features: int) -> list[slice]:
    """Slices of experts, each with `num_features` hidden features, that a CPU works on at once."""
    length = max(1, _CPU_FEATURES // max(1, num_features))
    return [slice(start, min(start + length, num_experts)) for start in range(0, num_experts, length)]


__all__ = ["run_slab"]
