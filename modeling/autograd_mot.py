"""What this package's operations with backward passes of their own share: when they step aside for torch's own."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from transformers.utils.generic import maybe_autocast
from transformers.utils.import_utils import is_tracing

from .companions_mot import is_compiling
from .gates_mot import Activation, is_silu


def find_autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Autocast's dtype where it is enabled: it reaches neither products with `out=` nor a backward pass by itself."""
    device_type = x.device.type
    # Autocast has no state on the meta device: asking for it raises.
    is_enabled = device_type != "meta" and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if is_enabled else None


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context for products on the device of `x` in the dtypes that they are given in."""
    return maybe_autocast(device_type="cpu" if x.is_meta else x.device.type, enabled=False)


def has_own_derivative(x: Tensor, *others: Tensor, activation: Activation) -> bool:
    """Whether operations of this package, whose backward passes are written out, may compute with these tensors."""
    if is_transformed(x, *others) or (isinstance(activation, nn.Module) and any(activation.parameters())):
        return False
    # An export must load where this package's operators are not registered, and they know one activation.
    return not is_tracing(x) or (is_compiling() and is_silu(activation))


def is_transformed(*values: Tensor) -> bool:
    """Whether `torch.func` or forward-mode differentiation is active, which support only torch's own operations."""
    if torch._C._are_functorch_transforms_active():  # torch has no public function for this
        return True
    return any(forward_ad.unpack_dual(value).tangent is not None for value in values)


def needs_plain_backward(grad: Tensor) -> bool:
    """Whether a backward pass must consist of torch's own operations."""
    # What is written with `out=` has no derivative, and `once_differentiable` does not guard against
    # `torch.autograd.grad(inputs=...)`: second derivatives would silently lack the path through this pass.
    # Nor can batched gradients (`is_grads_batched=True` makes legacy batches) be written to plain memory.
    return torch.is_grad_enabled() or is_transformed(grad) or is_legacy_batchedtensor(grad)


def run_plain_backward(
    run: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients by autograd; they are differentiable themselves if a graph of them is asked for.

    Args:
        run (`Callable`): The forward pass by torch's own operations: what was saved has no graph that leads back.
        inputs (`Sequence[torch.Tensor]`): Its inputs.
        grad (`torch.Tensor`): Gradient of its output.
        needed (`Sequence[bool]`): Which inputs need gradients.

    Returns:
        `list[torch.Tensor]`: The gradients, `None` for inputs that need none.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: if one tensor was computed from another, its gradient must not flow into that one here.
        leaves = [value.view_as(value) for value in inputs]
        output = run(*leaves)
    grads = iter(torch.autograd.grad(output, list(compress(leaves, needed)), grad, create_graph=create_graph))
    return [next(grads) if wanted else None for wanted in needed]


__all__ = [
    "find_autocast_dtype",
    "has_own_derivative",
    "is_transformed",
    "needs_plain_backward",
    "run_plain_backward",
    "without_autocast",
]
