"""The experts' nonlinearity and its gradient, by torch and by kernels, against autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mot_hf.modeling import gates_mot
from mot_hf.modeling.gates_mot import Activation, run_gates, run_gates_backward, run_gates_forward
from tests.interpreting import needs_triton, run_in_interpreter

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 8e-3}


def differentiate(gates: Tensor, grad_hidden: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """Hidden features and gradients in float64, by autograd."""
    leaf = gates.double().clone().requires_grad_()
    gate, value = leaf.chunk(2, dim=-1)
    hidden = activation(gate) * value
    (gradient,) = torch.autograd.grad(hidden, leaf, grad_hidden.double())
    return hidden.detach(), gradient


def check(activation: Activation, dtype: torch.dtype, num_features: int) -> None:
    generator = torch.Generator().manual_seed(num_features)
    gates = (3 * torch.randn(2, 5, 2 * num_features, generator=generator)).to(dtype)
    grad_hidden = torch.randn(2, 5, num_features, generator=generator).to(dtype)
    expected = differentiate(gates, grad_hidden, activation)
    before = gates.clone(), grad_hidden.clone()
    forwards = [(run(gates, activation),) for run in (run_gates, run_gates_forward)]
    for actual in (run_gates_backward(gates, grad_hidden, activation), *forwards):
        for value, wanted in zip(actual, expected, strict=False):
            assert value.dtype == dtype
            assert value.is_contiguous()
            assert (value.double() - wanted).norm() <= TOLERANCES[dtype] * wanted.norm()
    assert all(map(torch.equal, before, (gates, grad_hidden)))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("activation", [F.silu, nn.SiLU(), F.gelu, F.relu, nn.Identity()])
def test_gradients_are_those_of_autograd(activation: Activation, dtype: torch.dtype) -> None:
    for num_features in (1, 7, 32):
        check(activation, dtype, num_features)


@needs_triton
def test_kernels_compute_the_same() -> None:
    run_in_interpreter(__name__, "check_kernels")


def check_kernels() -> None:
    gates_mot.has_kernel = lambda gates, activation: True
    for num_features in (1, 7, 32, 1030):
        for dtype in (torch.float32, torch.bfloat16):
            check(F.silu, dtype, num_features)
