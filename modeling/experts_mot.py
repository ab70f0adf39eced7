"""Every expert of a MoT layer on its own batch of rows, as batched matrix products.

Axes: E experts, N rows of an expert, D model width, F expert width, I inputs and O outputs of a linear map. The
per-expert batch is the tensor `[E, N, D]` in which each expert has N rows of its own.
"""

from collections.abc import Callable
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from transformers.utils.import_utils import is_tracing

# Hidden features that a CPU computes at once. At 2 MB in float32 they are still in its cache when the second product
# reads them, and the allocator keeps their memory for the next chunk. With 8 MB it gave it back to the system.
_CPU_CHUNK_FEATURES = 2**19


def run_experts(
    expert_inputs: Tensor, gate_up_proj: Tensor, down_proj: Tensor, apply_gate: Callable[[Tensor], Tensor]
) -> Tensor:
    """Run every expert on its own rows.

    Derivatives of any order, and by any of torch's methods, equal those of the plain matrix products.

    Args:
        expert_inputs (`torch.Tensor` of shape `[E, N, D]`): The per-expert batch.
        gate_up_proj (`torch.Tensor` of shape `[E, 2F, D]`): The experts' first weights.
        down_proj (`torch.Tensor` of shape `[E, D, F]`): The experts' last weights.
        apply_gate (`Callable`): Maps gates and values `[..., 2F]` to hidden features `[..., F]`.

    Returns:
        `torch.Tensor` of shape `[E, N, D]`: The outputs.
    """
    device_type = expert_inputs.device.type
    # Autocast reaches neither products with `out=` nor a backward pass, in which bfloat16 gradients would meet the
    # saved inputs in float32. It has no state on the meta device: asking for it raises.
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        expert_inputs, gate_up_proj, down_proj = (
            value.to(dtype) for value in (expert_inputs, gate_up_proj, down_proj)
        )
    if _is_transformed(expert_inputs, gate_up_proj, down_proj):
        return _run_experts_bmm(expert_inputs, gate_up_proj, down_proj, apply_gate)
    # Not in a graph: a compiler would unroll the loop over chunks.
    if device_type == "cpu" and not is_tracing(expert_inputs):
        # Whether gradients are needed is asked here: inside an autograd function they are always off.
        return _ChunkedExperts.apply(expert_inputs, gate_up_proj, down_proj, apply_gate, torch.is_grad_enabled())
    hidden = apply_gate(_BatchedLinear.apply(expert_inputs, gate_up_proj))  # [E, N, F]
    return _BatchedLinear.apply(hidden, down_proj)  # [E, N, D]


def _run_experts_bmm(
    expert_inputs: Tensor, gate_up_proj: Tensor, down_proj: Tensor, apply_gate: Callable[[Tensor], Tensor]
) -> Tensor:
    hidden = apply_gate(torch.bmm(expert_inputs, gate_up_proj.mT))  # [E, N, F]
    return torch.bmm(hidden, down_proj.mT)  # [E, N, D]


def _is_transformed(*values: Tensor) -> bool:
    """Whether `torch.func` or forward-mode differentiation is active, which support only torch's own operations."""
    if torch._C._are_functorch_transforms_active():  # torch has no public function for this
        return True
    return any(forward_ad.unpack_dual(value).tangent is not None for value in values)


class _BatchedLinear(torch.autograd.Function):
    """Rows `[E, N, I]` times weights `[E, O, I]`."""

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
        # In the layout of the weights, the reason for this class: the derivative of `torch.bmm` is transposed, and
        # autograd would copy it, which is one more pass over the weights of all experts.
        grad_weights = torch.bmm(grad.mT, rows) if ctx.needs_input_grad[1] else None  # [E, O, I]
        return grad_rows, grad_weights


class _ChunkedExperts(torch.autograd.Function):
    """All experts on a CPU, a few at a time; the backward pass needs only the gates and values.

    Getting new memory from the system is slow on a CPU, and the hidden features of all experts do not fit its cache.
    """

    @staticmethod
    def forward(
        ctx: Any,
        expert_inputs: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        apply_gate: Callable[[Tensor], Tensor],
        needs_grad: bool,
    ) -> Tensor:
        num_experts, num_rows, width = expert_inputs.shape
        num_features = gate_up_proj.shape[1]
        chunks = _chunk_experts(num_experts, num_rows * num_features)
        # Each chunk writes its part of the whole (`out=`): joining the chunks' results would copy them all.
        outputs = expert_inputs.new_empty(num_experts, num_rows, width)  # [E, N, D]
        num_kept = num_experts if needs_grad else chunks[0].stop  # else all chunks share the memory of the first
        gates = expert_inputs.new_empty(num_kept, num_rows, num_features)  # [E, N, 2F]
        for chunk in chunks:
            gate = gates[chunk] if needs_grad else gates[: chunk.stop - chunk.start]
            torch.bmm(expert_inputs[chunk], gate_up_proj[chunk].mT, out=gate)
            torch.bmm(apply_gate(gate), down_proj[chunk].mT, out=outputs[chunk])
        if needs_grad:
            ctx.save_for_backward(expert_inputs, gate_up_proj, down_proj, gates)
            ctx.apply_gate, ctx.chunks = apply_gate, chunks
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # What is written with `out=` has no derivative, and `once_differentiable` does not guard against
        # `torch.autograd.grad(inputs=...)`: second derivatives would silently lack the path through this pass.
        # Nor can batched gradients (`is_grads_batched=True` makes legacy batches) be written to plain memory.
        if torch.is_grad_enabled() or _is_transformed(*grads) or is_legacy_batchedtensor(grads[0]):
            return _ChunkedExperts._backward_bmm(ctx, *grads)
        (grad,), (expert_inputs, gate_up_proj, down_proj, gates) = grads, ctx.saved_tensors
        grad_inputs, grad_gate_up, grad_down = (
            torch.empty_like(value, memory_format=torch.contiguous_format) if needed else None
            for value, needed in zip((expert_inputs, gate_up_proj, down_proj), ctx.needs_input_grad, strict=False)
        )
        for chunk in ctx.chunks:
            # By autograd, because `hidden_act` may be any activation.
            with torch.enable_grad():
                gate = gates[chunk].detach().requires_grad_()
                hidden = ctx.apply_gate(gate)
            if grad_down is not None:
                torch.bmm(grad[chunk].mT, hidden.detach(), out=grad_down[chunk])
            (grad_gate,) = torch.autograd.grad(hidden, gate, torch.bmm(grad[chunk], down_proj[chunk]))
            if grad_gate_up is not None:
                torch.bmm(grad_gate.mT, expert_inputs[chunk], out=grad_gate_up[chunk])
            if grad_inputs is not None:
                torch.bmm(grad_gate, gate_up_proj[chunk], out=grad_inputs[chunk])
        return grad_inputs, grad_gate_up, grad_down, None, None

    @staticmethod
    def _backward_bmm(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The same gradients by autograd; they are differentiable themselves if a graph of them is asked for."""
        create_graph, needed = torch.is_grad_enabled(), ctx.needs_input_grad[:3]
        with torch.enable_grad():
            # Views: if one input was computed from another, its gradient must not flow into that one here.
            inputs = [value.view_as(value) for value in ctx.saved_tensors[:3]]
            # Forward once more: the saved gates have no graph that leads back to the inputs.
            outputs = _run_experts_bmm(*inputs, ctx.apply_gate)
        grads = iter(torch.autograd.grad(outputs, list(compress(inputs, needed)), grad, create_graph=create_graph))
        return *(next(grads) if wanted else None for wanted in needed), None, None


def _chunk_experts(num_experts: int, num_features: int) -> list[slice]:
    """Slices of experts, each with `num_features` hidden features, that a CPU runs at once."""
    length = max(1, _CPU_CHUNK_FEATURES // max(1, num_features))
    return [slice(start, min(start + length, num_experts)) for start in range(0, num_experts, length)]


__all__ = ["run_experts"]
