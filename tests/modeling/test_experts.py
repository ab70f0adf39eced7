"""Per-expert batches against a loop over experts, values and derivatives."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.functional import hessian, hvp, jacobian
from torch.utils.checkpoint import checkpoint

from mot_hf import MoTForCausalLM
from mot_hf.modeling import experts_mot, modeling_mot
from mot_hf.modeling.experts_mot import run_experts
from tests.models import random_ids, tiny_config, trained

WAYS = ("in parts", "at once")
Run = Callable[..., Tensor]


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def run_one_by_one(expert_inputs: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    experts = zip(expert_inputs, gate_up_proj, down_proj, strict=True)
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
    """`run_experts` in both ways; in chunks of one or a few experts."""
    monkeypatch.setattr(experts_mot, "_CPU_CHUNK_FEATURES", 60)
    if request.param == "at once":
        monkeypatch.setattr(experts_mot, "is_tracing", lambda tensor: True)
    return lambda *inputs: run_experts(*inputs, swiglu)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.integers(0, 9), st.integers(1, 5), st.integers(1, 6), st.sampled_from(WAYS))
def test_values_and_gradients_are_those_of_a_loop(
    num_experts: int, num_rows: int, width: int, features: int, way: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts_mot, "_CPU_CHUNK_FEATURES", 60)
        if way == "at once":
            patch.setattr(experts_mot, "is_tracing", lambda tensor: True)
        inputs = draw(num_experts, num_rows, width, features)
        actual = gradients(lambda *values: run_experts(*values, swiglu), inputs)
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


def test_a_per_expert_batch_in_another_order_of_memory_gives_the_same(run: Callable[..., Tensor]) -> None:
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


def test_a_per_expert_batch_without_data_has_a_shape() -> None:
    expert_inputs, *weights = (value.to("meta") for value in draw(5, 4, 3, 6))
    assert run_experts(expert_inputs, *weights, swiglu).shape == (5, 4, 3)


def scalar(run: Run, *inputs: Tensor) -> Tensor:
    return run(*inputs).sin().sum()


def grad_of(run: Run, inputs: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(scalar(run, *inputs), inputs, **options)


def dot(values: Any, others: Any) -> Tensor:
    return torch.stack([(value * other).sum() for value, other in zip(values, others, strict=True)]).sum()


def draw_with_directions() -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = draw(3, 2, 2, 2)
    return inputs, [torch.randn(value.shape, generator=generator, dtype=value.dtype) for value in inputs]


def test_derivatives_are_those_of_finite_differences(run: Run) -> None:
    inputs, _ = draw_with_directions()
    forward = {"check_forward_ad": True, "check_batched_forward_grad": True}
    assert gradcheck(run, inputs, check_batched_grad=True, **forward)
    assert gradgradcheck(run, inputs, check_batched_grad=True, check_fwd_over_rev=True)


def second(run: Run, x: list[Tensor], v: list[Tensor]) -> Any:
    return torch.autograd.grad(dot(grad_of(run, x, create_graph=True), v), x)


def second_by_backward(run: Run, x: list[Tensor], v: list[Tensor]) -> Any:
    scalar(run, *x).backward(create_graph=True)
    gradients = [value.grad for value in x]
    for value in x:
        value.grad = None
    dot(gradients, v).backward()
    return [value.grad for value in x]


def third(run: Run, x: list[Tensor], v: list[Tensor]) -> Any:
    seconds = torch.autograd.grad(dot(grad_of(run, x, create_graph=True), v), x, create_graph=True)
    return torch.autograd.grad(dot(seconds, v), x)


def of_inputs_of_one_another(run: Run, x: list[Tensor], v: list[Tensor]) -> Any:
    weights = x[1]  # [E, 2F, D]
    inputs = [weights[:, :2].sin(), weights, weights[:, 2:].mT.cos()]
    (gradient,) = torch.autograd.grad(scalar(run, *inputs), weights, create_graph=True)
    return gradient, torch.autograd.grad(dot([gradient], v[1:2]), weights)


def inside_a_checkpoint(run: Run, x: list[Tensor], v: list[Tensor]) -> Any:
    def penalty(*inputs: Tensor) -> Tensor:
        return dot(grad_of(run, list(inputs), create_graph=True), v)

    return torch.autograd.grad(checkpoint(penalty, *x, use_reentrant=False), x)


def of_a_checkpoint(run: Run, x: list[Tensor], v: list[Tensor]) -> Any:
    return second(lambda *inputs: checkpoint(run, *inputs, use_reentrant=False), x, v)


def batched(run: Run, x: list[Tensor], v: list[Tensor]) -> Any:
    return torch.autograd.grad(run(*x), x, torch.stack([x[0].detach(), v[0]]), is_grads_batched=True)


def batched_by_vmap(run: Run, x: list[Tensor], v: list[Tensor]) -> Any:
    output = run(*x)
    return torch.vmap(lambda grad: torch.autograd.grad(output, x, grad, retain_graph=True))(torch.stack([v[0], -v[0]]))


def per_sample(run: Run, x: list[Tensor], v: list[Tensor]) -> Any:
    gradient = torch.func.grad(partial(scalar, run), argnums=(1, 2))
    return torch.vmap(gradient, in_dims=(0, None, None))(torch.stack([x[0], v[0]]), *x[1:])


def dual(run: Run, x: list[Tensor], v: list[Tensor]) -> Any:
    tangents = []
    for moved in ((0,), (1,), (2,), (0, 1, 2)):
        with forward_ad.dual_level():
            inputs = [forward_ad.make_dual(x[i], v[i]) if i in moved else x[i] for i in range(3)]
            tangents.append(forward_ad.unpack_dual(run(*inputs)).tangent)
    return tangents


DERIVATIVES: dict[str, Callable[[Run, list[Tensor], list[Tensor]], Any]] = {
    "twice": second,
    "twice by backward": second_by_backward,
    "thrice": third,
    "inputs of one another": of_inputs_of_one_another,
    "inside a checkpoint": inside_a_checkpoint,
    "of a checkpoint": of_a_checkpoint,
    "batched": batched,
    "batched by vmap": batched_by_vmap,
    "dual numbers": dual,
    "hvp": lambda run, x, v: hvp(partial(scalar, run), tuple(x), tuple(v)),
    "vectorized hessian": lambda run, x, v: hessian(partial(scalar, run), tuple(x), vectorize=True),
    "vectorized jacobian": lambda run, x, v: jacobian(run, tuple(x), vectorize=True),
    "func.grad": lambda run, x, v: torch.func.grad(partial(scalar, run), (0, 1, 2))(*x),
    "func.vjp": lambda run, x, v: torch.func.vjp(run, *x)[1](v[0]),
    "func.jvp": lambda run, x, v: torch.func.jvp(run, tuple(x), tuple(v)),
    "func.vmap": lambda run, x, v: torch.vmap(run, (0, None, None))(torch.stack([x[0], v[0]]), *x[1:]),
    "func.jacrev": lambda run, x, v: torch.func.jacrev(run, (0, 1, 2))(*x),
    "func.jacfwd": lambda run, x, v: torch.func.jacfwd(run, (0, 1, 2))(*x),
    "func.hessian": lambda run, x, v: torch.func.hessian(partial(scalar, run), (0, 1, 2))(*x),
    "per sample": per_sample,
}


@pytest.mark.filterwarnings("ignore:.*reference cycle")  # which `second_by_backward` breaks
@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES)
def test_derivatives_of_any_order_and_kind_are_those_of_a_loop(
    run: Run, derivative: Callable[[Run, list[Tensor], list[Tensor]], Any]
) -> None:
    expected = derivative(run_one_by_one, *draw_with_directions())
    torch.testing.assert_close(derivative(run, *draw_with_directions()), expected)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2), (0, 2), (0, 1)])
def test_second_derivatives_with_frozen_inputs_are_those_of_a_loop(run: Run, frozen: tuple[int, ...]) -> None:
    inputs, directions = draw_with_directions()
    for position in frozen:
        inputs[position].requires_grad_(False)
    wanted = [i for i in range(3) if i not in frozen]

    def derivative(run: Run) -> tuple[Tensor, ...]:
        moving = [inputs[i] for i in wanted]
        gradients = torch.autograd.grad(scalar(run, *inputs), moving, create_graph=True)
        return torch.autograd.grad(dot(gradients, [directions[i] for i in wanted]), moving)

    torch.testing.assert_close(derivative(run), derivative(run_one_by_one))


def test_a_gradient_of_a_dual_number_is_one(run: Run) -> None:
    inputs, (direction, *_) = draw_with_directions()
    # A gate of products alone: torch knows no forward derivative of the gradient of silu.
    output = run_experts(*inputs, lambda gate_up: gate_up[..., :2] * gate_up[..., 2:])
    with forward_ad.dual_level():
        gradients = torch.autograd.grad(output, inputs, forward_ad.make_dual(direction, -2 * direction))
        for gradient, tangent in map(forward_ad.unpack_dual, gradients):
            torch.testing.assert_close(tangent, -2 * gradient)


def test_compiled_gradients_of_torch_func_are_those_of_a_loop() -> None:
    inputs, _ = draw_with_directions()
    gradient = torch.func.grad(lambda *values: run_experts(*values, swiglu).sin().sum(), (0, 1, 2))
    torch.compiler.reset()
    actual = torch.compile(gradient, backend="aot_eager", fullgraph=True)(*inputs)
    torch.compiler.reset()
    torch.testing.assert_close(actual, grad_of(run_one_by_one, inputs))


def run_plainly(
    expert_inputs: Tensor, gate_up_proj: Tensor, down_proj: Tensor, apply_gate: Callable[..., Tensor]
) -> Tensor:
    return torch.bmm(apply_gate(torch.bmm(expert_inputs, gate_up_proj.mT)), down_proj.mT)


def tiny_model() -> MoTForCausalLM:
    torch.manual_seed(0)
    return trained(MoTForCausalLM(tiny_config(num_hidden_layers=2, attn_implementation="eager")))


@pytest.mark.parametrize("training", [False, True])
def test_hessian_vector_products_of_a_model_are_those_of_plain_products(
    monkeypatch: pytest.MonkeyPatch, training: bool
) -> None:
    def product() -> tuple[Tensor, ...]:
        model, ids = tiny_model().train(training), random_ids(6, 5)
        parameters = list(model.parameters())
        loss = model(ids, labels=ids, mixing="cross_example").loss
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        return torch.autograd.grad(dot(gradients, map(torch.cos, parameters)), parameters)

    actual = product()
    monkeypatch.setattr(modeling_mot, "run_experts", run_plainly)
    torch.testing.assert_close(actual, product(), atol=1e-4, rtol=1e-3)


def test_a_model_is_differentiated_by_torch_func_as_by_backward() -> None:
    model, ids = tiny_model(), random_ids(6, 5)
    inputs = {"input_ids": ids, "labels": ids, "mixing": "cross_example"}
    parameters = dict(model.named_parameters())
    actual = torch.func.grad(lambda values: torch.func.functional_call(model, values, (), inputs).loss)(parameters)
    model(**inputs).loss.backward()
    torch.testing.assert_close(actual, {name: value.grad for name, value in parameters.items()})


# A row of the weights is hidden_size or moe_intermediate_size numbers long: 16 bytes are 4 of float32.
@pytest.mark.parametrize("mixing", ["per_sequence", "moe"])
@pytest.mark.parametrize(
    ("hidden_size", "moe_intermediate_size", "dtype"),
    [(16, 6, torch.float32), (18, 8, torch.float32), (16, 4, torch.bfloat16), (16, 3, torch.float64)],
)
def test_experts_of_any_width_run_selected(
    mixing: str, hidden_size: int, moe_intermediate_size: int, dtype: torch.dtype
) -> None:
    sizes = {"hidden_size": hidden_size, "moe_intermediate_size": moe_intermediate_size, "head_dim": 8}
    model = trained(MoTForCausalLM(tiny_config(**sizes))).to(dtype)
    ids = random_ids(3, 5)

    def run(implementation: str) -> list[Tensor]:
        model.set_experts_implementation(implementation)
        model.zero_grad()
        loss = model(ids, labels=ids, mixing=mixing).loss
        loss.backward()
        return [loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]

    for actual, expected in zip(run("grouped_mm"), run("eager"), strict=True):
        torch.testing.assert_close(actual, expected)


def test_experts_of_any_width_run_in_a_graph() -> None:
    model = trained(MoTForCausalLM(tiny_config(moe_intermediate_size=6)))
    ids = random_ids(3, 5)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for mixing in ("per_sequence", "moe"):
        torch.testing.assert_close(compiled(ids, mixing=mixing).logits, model(ids, mixing=mixing).logits)
