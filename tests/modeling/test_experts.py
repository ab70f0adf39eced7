"""Mixing, experts and handing back as one operation against a loop over experts, values and derivatives."""

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
from mot_hf.modeling.experts_mot import Mixed, mix_and_run
from tests.models import random_ids, tiny_config, trained

WAYS = ("in parts", "joined", "plain")
Run = Callable[..., Tensor]


def run_one_by_one(
    x: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor, mean_input: Tensor | None = None
) -> Tensor:
    """Loops over groups and experts."""
    num_tokens = x.shape[1] - (mean_input is not None)
    outputs = []
    for e, (gate_up, down) in enumerate(zip(gate_up_proj, down_proj, strict=True)):
        w = weights[..., e, None]  # [A, H, T, 1]
        mixture = (w * x).sum(dim=1)  # [A, T, D]
        if mean_input is not None:
            mixture = mixture + w[:, -1] * mean_input[e]
        gate, value = F.linear(mixture, gate_up).chunk(2, dim=-1)
        outputs.append(w[:, :num_tokens] * F.linear(F.silu(gate) * value, down)[:, None])
    return torch.stack(outputs).sum(dim=0)


def draw(
    num_experts: int,
    num_columns: int,
    width: int,
    features: int,
    dtype: torch.dtype = torch.float64,
    num_row_groups: int = 2,
    num_rows: int = 3,
) -> list[Tensor]:
    """Tokens, weights and the experts' weights."""
    generator = torch.Generator().manual_seed(num_experts + num_columns)
    groups = (num_row_groups, num_rows, num_columns)
    shapes = ((*groups, width), (*groups, num_experts), (num_experts, 2 * features, width))
    shapes += ((num_experts, width, features),)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def project(output: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return (output * weights).sum()


def gradients(run: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    output = run(*inputs)
    wanted = [value for value in inputs if value.requires_grad]
    return [output, *torch.autograd.grad(project(output), wanted)]


def set_way(patch: pytest.MonkeyPatch, way: str) -> None:
    """Parts and chunks of one or a few experts; tokens of several groups of rows in one; or torch's own operations."""
    patch.setattr(experts_mot, "_CPU_ELEMENTS", (30, 40))
    patch.setattr(experts_mot, "_MIN_PART", 2)
    if way == "joined":
        patch.setattr(experts_mot, "_MAX_ROW_GROUPS", 1)
    elif way == "plain":
        patch.setattr(experts_mot, "_needs_plain", lambda *_: True)


def run_in_one(*inputs: Tensor, **options: Tensor) -> Tensor:
    return mix_and_run(*inputs, F.silu, **options).output


@pytest.fixture(params=WAYS)
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The operation's output, in every way that it is computed."""
    set_way(monkeypatch, request.param)
    return run_in_one


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 7), st.integers(0, 4), st.integers(1, 5), st.integers(1, 6), st.booleans(), st.sampled_from(WAYS)
)
def test_values_and_gradients_are_those_of_a_loop(
    num_experts: int, num_columns: int, width: int, features: int, padded: bool, way: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        set_way(patch, way)
        inputs = draw(num_experts, num_columns, width, features)
        options = {"mean_input": torch.randn(num_experts, width).double()} if padded else {}
        actual = gradients(partial(run_in_one, **options), inputs)
    torch.testing.assert_close(actual, gradients(partial(run_one_by_one, **options), inputs))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("padded", [False, True])
def test_sums_are_those_over_tokens_of_mixtures_and_outputs(
    monkeypatch: pytest.MonkeyPatch, padded: bool, way: str
) -> None:
    set_way(monkeypatch, way)
    x, weights, gate_up, down = draw(5, 4, 3, 6, torch.float32)
    mean_input = torch.randn(5, 3) if padded else None
    counts = torch.randint(4, (4, 8)).float()  # [R, N]
    mixed = mix_and_run(x, weights, gate_up, down, F.silu, mean_input, counts)
    assert mixed.sums is not None
    assert mixed.bucket_sums is not None
    assert not mixed.sums.requires_grad
    assert not mixed.bucket_sums.requires_grad
    mixtures = torch.einsum("ahte,ahtd->eatd", weights, x)
    if mean_input is not None:
        mixtures = mixtures + weights[:, -1].permute(2, 0, 1)[..., None] * mean_input[:, None, None]
    gate, value = torch.einsum("eatd,efd->eatf", mixtures, gate_up).chunk(2, dim=-1)
    outputs = torch.einsum("eatf,edf->eatd", F.silu(gate) * value, down)
    for own, own_in_buckets, values in zip(mixed.sums, mixed.bucket_sums, (mixtures, outputs), strict=True):
        values = values.flatten(1, 2)  # [E, N, D]
        torch.testing.assert_close(own, (counts[0, :, None] * values).sum(dim=1))
        torch.testing.assert_close(own_in_buckets, torch.einsum("pn,end->pd", counts[1:], values))


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (3,), (2, 3), (0, 1), (0, 2), (1, 3), (0, 1, 2), (0, 1, 3)])
def test_frozen_inputs_get_no_gradient_and_others_the_same(run: Run, frozen: tuple[int, ...]) -> None:
    inputs = draw(5, 4, 3, 6)
    for position in frozen:
        inputs[position].requires_grad_(False)
    torch.testing.assert_close(gradients(run, inputs), gradients(run_one_by_one, inputs))
    assert all(inputs[position].grad is None for position in frozen)


def test_gradients_have_the_layout_of_the_weights() -> None:
    *_, gate_up, down = gradients(run_in_one, draw(5, 4, 3, 6))
    assert gate_up.is_contiguous()
    assert down.is_contiguous()


@pytest.mark.parametrize("position", range(4))
def test_inputs_in_another_order_of_memory_give_the_same(run: Run, position: int) -> None:
    inputs = draw(5, 4, 3, 6)
    expected = gradients(run_one_by_one, inputs)
    inputs[position] = inputs[position].detach().mT.contiguous().mT.requires_grad_()
    torch.testing.assert_close(gradients(run, inputs), expected)


def test_a_gradient_in_another_order_of_memory_gives_the_same(run: Run) -> None:
    inputs = draw(5, 4, 3, 6)
    grad = torch.randn(2, 3, 3, 4, dtype=torch.float64).mT  # [A, G, T, D]
    actual, expected = (torch.autograd.grad(one(*inputs), inputs, grad) for one in (run, run_one_by_one))
    torch.testing.assert_close(actual, expected)


def test_without_gradients_the_values_are_the_same(run: Run) -> None:
    inputs = draw(5, 4, 3, 6)
    with torch.no_grad():
        output = run(*inputs)
    assert not output.requires_grad
    torch.testing.assert_close(output, run_one_by_one(*inputs).detach())


def test_autocast_computes_in_bfloat16_and_gives_float32_gradients(run: Run) -> None:
    inputs = draw(5, 4, 3, 6, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = run(*inputs)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert {value.grad.dtype for value in inputs if value.grad is not None} == {torch.float32}
    expected = run_one_by_one(*inputs)
    torch.testing.assert_close(output.float(), expected, atol=0.2, rtol=0.05)


def test_gradients_accumulate_over_backward_passes(run: Run) -> None:
    inputs = draw(5, 4, 3, 6)
    once = gradients(run, inputs)[1:]
    output = run(*inputs)
    for retain in (True, False):
        project(output).backward(retain_graph=retain)
    torch.testing.assert_close([value.grad for value in inputs], [2 * gradient for gradient in once])


def test_inputs_without_data_have_a_shape() -> None:
    x, *others = (value.to("meta") for value in draw(5, 4, 3, 6))
    assert run_in_one(x, *others).shape == x.shape


class Squeeze(torch.nn.Module):
    """An activation with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, gate: Tensor) -> Tensor:
        return (self.slope * gate).tanh()


def test_an_activation_learns_too() -> None:
    activation = Squeeze()
    mix_and_run(*draw(5, 4, 3, 6), activation).output.sin().sum().backward()
    assert activation.slope.grad is not None


@pytest.mark.parametrize("activation", [F.gelu, F.relu, torch.nn.Identity()])
def test_other_activations_are_differentiated_too(activation: Callable[[Tensor], Tensor]) -> None:
    inputs = draw(3, 2, 3, 2)
    assert gradcheck(lambda *values: mix_and_run(*values, activation).output, inputs)


def measure_saved(run: Callable[[], Any]) -> int:
    """Bytes that autograd keeps."""
    sizes: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        run()
    return sum(sizes.values())


@pytest.mark.parametrize("padded", [False, True])
def test_neither_mixtures_nor_hidden_features_are_kept(padded: bool) -> None:
    inputs = draw(num_experts=8, num_columns=5, width=16, features=24, dtype=torch.float32)
    mean_input = torch.randn(8, 16) if padded else None
    saved = measure_saved(lambda: mix_and_run(*inputs, F.silu, mean_input))
    num_groups = 2 * 5
    outputs, gates = 4 * 8 * num_groups * 16, 4 * 8 * num_groups * 2 * 24
    own = sum(value.nbytes for value in inputs) + (0 if mean_input is None else mean_input.nbytes)
    assert saved == own + outputs + gates


def scalar(run: Run, *inputs: Tensor) -> Tensor:
    return run(*inputs).sin().sum()


def grad_of(run: Run, inputs: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(scalar(run, *inputs), inputs, **options)


def dot(values: Any, others: Any) -> Tensor:
    return torch.stack([(value * other).sum() for value, other in zip(values, others, strict=True)]).sum()


def draw_with_directions() -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = draw(3, 2, 2, 2, num_row_groups=1, num_rows=2)
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
    weights = x[2]  # [E, 2F, D]
    tokens, mixing = weights[None, :2, :2, :2].sin(), weights[None, :2, :2, :1].cos().expand(-1, -1, -1, 3)
    inputs = [tokens, mixing, weights, weights[:, 2:].mT.cos()]
    (gradient,) = torch.autograd.grad(scalar(run, *inputs), weights, create_graph=True)
    return gradient, torch.autograd.grad(dot([gradient], v[2:3]), weights)


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
    gradient = torch.func.grad(partial(scalar, run), argnums=(2, 3))
    return torch.vmap(gradient, in_dims=(0, None, None, None))(torch.stack([x[0], v[0]]), *x[1:])


def dual(run: Run, x: list[Tensor], v: list[Tensor]) -> Any:
    tangents = []
    for moved in ((0,), (1,), (2,), (3,), (0, 1, 2, 3)):
        with forward_ad.dual_level():
            inputs = [forward_ad.make_dual(x[i], v[i]) if i in moved else x[i] for i in range(4)]
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
    "func.grad": lambda run, x, v: torch.func.grad(partial(scalar, run), (0, 1, 2, 3))(*x),
    "func.vjp": lambda run, x, v: torch.func.vjp(run, *x)[1](v[0]),
    "func.jvp": lambda run, x, v: torch.func.jvp(run, tuple(x), tuple(v)),
    "func.vmap": lambda run, x, v: torch.vmap(run, (0, None, None, None))(torch.stack([x[0], v[0]]), *x[1:]),
    "func.jacrev": lambda run, x, v: torch.func.jacrev(run, (0, 1, 2, 3))(*x),
    "func.jacfwd": lambda run, x, v: torch.func.jacfwd(run, (0, 1, 2, 3))(*x),
    "func.hessian": lambda run, x, v: torch.func.hessian(partial(scalar, run), (0, 1, 2, 3))(*x),
    "per sample": per_sample,
}


@pytest.mark.filterwarnings("ignore:.*reference cycle")  # which `second_by_backward` breaks
@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES)
def test_derivatives_of_any_order_and_kind_are_those_of_a_loop(
    run: Run, derivative: Callable[[Run, list[Tensor], list[Tensor]], Any]
) -> None:
    expected = derivative(run_one_by_one, *draw_with_directions())
    torch.testing.assert_close(derivative(run, *draw_with_directions()), expected)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (3,), (2, 3), (0, 2), (0, 1)])
def test_second_derivatives_with_frozen_inputs_are_those_of_a_loop(run: Run, frozen: tuple[int, ...]) -> None:
    inputs, directions = draw_with_directions()
    for position in frozen:
        inputs[position].requires_grad_(False)
    wanted = [i for i in range(4) if i not in frozen]

    def derivative(run: Run) -> tuple[Tensor, ...]:
        moving = [inputs[i] for i in wanted]
        gradients = torch.autograd.grad(scalar(run, *inputs), moving, create_graph=True)
        return torch.autograd.grad(dot(gradients, [directions[i] for i in wanted]), moving)

    torch.testing.assert_close(derivative(run), derivative(run_one_by_one))


def test_a_gradient_of_a_dual_number_is_one(run: Run) -> None:
    inputs, (direction, *_) = draw_with_directions()
    # A gate of products alone: torch knows no forward derivative of the gradient of silu.
    output = mix_and_run(*inputs, torch.nn.Identity()).output
    with forward_ad.dual_level():
        gradients = torch.autograd.grad(output, inputs, forward_ad.make_dual(direction, -2 * direction))
        for gradient, tangent in map(forward_ad.unpack_dual, gradients):
            torch.testing.assert_close(tangent, -2 * gradient)


def test_compiled_gradients_of_torch_func_are_those_of_a_loop() -> None:
    inputs, _ = draw_with_directions()
    gradient = torch.func.grad(lambda *values: run_in_one(*values).sin().sum(), (0, 1, 2, 3))
    torch.compiler.reset()
    actual = torch.compile(gradient, backend="aot_eager", fullgraph=True)(*inputs)
    torch.compiler.reset()
    torch.testing.assert_close(actual, grad_of(run_one_by_one, inputs))


def run_plainly(
    x: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    activation: Callable[[Tensor], Tensor],
    mean_input: Tensor | None,
    counts: Tensor | None,
) -> Mixed:
    sums = mix_and_run(x, weights, gate_up_proj, down_proj, activation, mean_input, counts)
    return sums._replace(output=run_one_by_one(x, weights, gate_up_proj, down_proj, mean_input))


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
    monkeypatch.setattr(modeling_mot, "mix_and_run", run_plainly)
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
        if mixing == "per_sequence" and dtype == torch.bfloat16:  # rounded at other places: eager adds in bfloat16
            assert (actual.float() - expected.float()).norm() < 2e-2 * expected.float().norm()
        else:
            torch.testing.assert_close(actual, expected)


def test_experts_of_any_width_run_in_a_graph() -> None:
    model = trained(MoTForCausalLM(tiny_config(moe_intermediate_size=6)))
    ids = random_ids(3, 5)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for mixing in ("per_sequence", "moe"):
        torch.testing.assert_close(compiled(ids, mixing=mixing).logits, model(ids, mixing=mixing).logits)
