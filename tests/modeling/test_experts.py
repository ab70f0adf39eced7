"""The experts on a slab against a loop over experts, values and gradients."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mot_hf.modeling import experts_mot
from mot_hf.modeling.experts_mot import run_slab

WAYS = ("in parts", "at once")


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def run_one_by_one(slab: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    experts = zip(slab, gate_up_proj, down_proj, strict=True)
    return torch.stack([F.linear(swiglu(F.linear(rows, up)), down) for rows, up, down in experts])


def draw(
    num_experts: int, num_rows: int, width: int, features: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_experts + num_rows)
    shapes = ((num_experts, num_rows, width), (num_experts, 2 * features, width), (num_experts, width, features))
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def gradients(run: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    output = run(*inputs)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    wanted = [value for value in inputs if value.requires_grad]
    return [output, *torch.autograd.grad((output * weights).sum(), wanted)]


@pytest.fixture(params=WAYS)
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """`run_slab` in both ways; in parts of one or a few experts."""
    monkeypatch.setattr(experts_mot, "_CPU_FEATURES", 60)
    if request.param == "at once":
        monkeypatch.setattr(experts_mot, "is_tracing", lambda tensor: True)
    return lambda *inputs: run_slab(*inputs, swiglu)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.integers(0, 9), st.integers(1, 5), st.integers(1, 6), st.sampled_from(WAYS))
def test_values_and_gradients_are_those_of_a_loop(
    num_experts: int, num_rows: int, width: int, features: int, way: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts_mot, "_CPU_FEATURES", 60)
        if way == "at once":
            patch.setattr(experts_mot, "is_tracing", lambda tensor: True)
        inputs = draw(num_experts, num_rows, width, features)
        actual = gradients(lambda *values: run_slab(*values, swiglu), inputs)
    torch.testing.assert_close(actual, gradients(run_one_by_one, inputs))


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2), (0, 1)])
def test_frozen_inputs_get_no_gradient_and_others_the_same(
    run: Callable[..., Tensor], frozen: tuple[int, ...]
) -> None:
    inputs = draw(5, 4, 3, 6)
    for position in frozen:
        inputs[position].requires_grad_(False)
    torch.testing.assert_close(gradients(run, inputs), gradients(run_one_by_one, inputs))
    assert all(inputs[position].grad is None for position in frozen)


def test_gradients_have_the_layout_of_the_weights(run: Callable[..., Tensor]) -> None:
    inputs = draw(5, 4, 3, 6)
    _, _, *of_weights = gradients(run, inputs)
    assert all(gradient.is_contiguous() for gradient in of_weights)


def test_a_slab_in_another_order_of_memory_gives_the_same(run: Callable[..., Tensor]) -> None:
    inputs = draw(5, 4, 3, 6)
    expected = gradients(run_one_by_one, inputs)
    inputs[0] = inputs[0].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    torch.testing.assert_close(gradients(run, inputs), expected)


def test_without_gradients_the_values_are_the_same(run: Callable[..., Tensor]) -> None:
    inputs = draw(5, 4, 3, 6)
    with torch.no_grad():
        output = run(*inputs)
    assert not output.requires_grad
    torch.testing.assert_close(output, run_one_by_one(*inputs).detach())


def test_autocast_computes_in_bfloat16_and_gives_float32_gradients(run: Callable[..., Tensor]) -> None:
    inputs = draw(5, 4, 3, 6, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = run(*inputs)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert {value.grad.dtype for value in inputs if value.grad is not None} == {torch.float32}
    expected = run_one_by_one(*inputs)
    torch.testing.assert_close(output.float(), expected, atol=0.1, rtol=0.05)


def test_gradients_accumulate_over_backward_passes(run: Callable[..., Tensor]) -> None:
    inputs = draw(5, 4, 3, 6)
    once = gradients(run, inputs)[1:]
    output = run(*inputs)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    for retain in (True, False):
        (output * weights).sum().backward(retain_graph=retain)
    torch.testing.assert_close([value.grad for value in inputs], [2 * gradient for gradient in once])


def test_a_slab_without_data_has_a_shape() -> None:
    slab, *weights = (value.to("meta") for value in draw(5, 4, 3, 6))
    assert run_slab(slab, *weights, swiglu).shape == (5, 4, 3)
