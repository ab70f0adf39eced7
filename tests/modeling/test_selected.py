"""Selected experts on mixtures of their own against a loop over pairs, values and derivatives, and who runs them."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from mot_hf import MoTForCausalLM
from mot_hf.modeling import gates_mot, modeling_mot, selected_mot
from mot_hf.modeling.pairs_mot import (
    Mixing,
    dot_in_kernel,
    dot_pairs,
    mix_in_kernel,
    mix_pairs,
    sort_pairs,
    sum_in_kernel,
)
from mot_hf.modeling.selected_mot import OwnMixtures, mix_and_run_selected
from scripts.benchmarks.measuring import measure_peak_memory
from tests.interpreting import needs_triton, run_in_interpreter
from tests.models import random_ids, tiny_config, trained

NUM_EXPERTS, NUM_BUCKETS, WIDTH = 5, 3, 4


class Selected:
    """Tokens, output weights, experts' weights and mixing weights with gradients, and what has none."""

    def __init__(
        self,
        num_tokens: int = 7,
        k: int = 2,
        dtype: torch.dtype = torch.float64,
        width: int = WIDTH,
        num_features: int = 3,
    ) -> None:
        generator = torch.Generator().manual_seed(num_tokens)
        shapes = [(num_tokens, width), (num_tokens, k)]
        shapes += [(NUM_EXPERTS, 2 * num_features, width), (NUM_EXPERTS, width, num_features)]
        shapes += [(num_tokens, k), (NUM_EXPERTS, width), (NUM_BUCKETS, width)]
        values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        self.statistics = [value.to(torch.promote_types(dtype, torch.float32)) for value in values[5:]]
        # A weight of the output is another than that in the mixture. The last expert is never selected.
        kinds = [dtype, self.statistics[0].dtype, dtype, dtype, self.statistics[0].dtype]
        self.leaves = [value.to(kind).requires_grad_() for value, kind in zip(values[:5], kinds, strict=True)]
        scores = torch.rand(num_tokens, NUM_EXPERTS - 1, generator=generator)
        self.index = scores.topk(k).indices
        self.buckets = torch.randint(NUM_BUCKETS, (num_tokens,), generator=generator)

    def run(
        self, x: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor, mixing_weights: Tensor
    ) -> Tensor:
        own = OwnMixtures(mixing_weights, self.buckets, *self.statistics)
        return mix_and_run_selected(x, self.index, weights, own, gate_up_proj, down_proj, F.silu)

    def loop(
        self, x: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor, mixing_weights: Tensor
    ) -> Tensor:
        """A loop over tokens and their experts."""
        mean_input, input_shift = self.statistics
        outputs = []
        for t, token in enumerate(x):
            total = torch.zeros_like(token)
            for e, output_weight, w in zip(self.index[t], weights[t], mixing_weights[t], strict=True):
                mixture = w * token + (1 - w) * (mean_input[e] + input_shift[self.buckets[t]])
                gate, value = (gate_up_proj[e] @ mixture.to(x.dtype)).chunk(2)
                total = total + output_weight * (down_proj[e] @ (F.silu(gate) * value))
            outputs.append(total)
        return torch.stack(outputs)


def project(output: Tensor) -> Tensor:
    return (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)).sum()


@pytest.mark.parametrize(("num_tokens", "k"), [(7, 2), (1, 1), (9, 4)])
def test_values_and_gradients_are_those_of_a_loop(num_tokens: int, k: int) -> None:
    case = Selected(num_tokens, k)
    actual, expected = case.run(*case.leaves), case.loop(*case.leaves)
    torch.testing.assert_close(actual, expected)
    gradients = (torch.autograd.grad(project(output), case.leaves) for output in (actual, expected))
    for gradient, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_without_gradients_the_values_are_the_same() -> None:
    case = Selected()
    with torch.no_grad():
        torch.testing.assert_close(case.run(*case.leaves), case.loop(*case.leaves))


@pytest.mark.parametrize("frozen", [(2, 3), (0,), (1, 4)])
def test_frozen_inputs_get_no_gradient_and_others_the_same(frozen: tuple[int, ...]) -> None:
    case = Selected()
    for place in frozen:
        case.leaves[place].requires_grad_(False)
    learning = [leaf for leaf in case.leaves if leaf.requires_grad]
    gradients = (torch.autograd.grad(project(run(*case.leaves)), learning) for run in (case.run, case.loop))
    for gradient, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_derivatives_of_first_and_second_order_are_those_of_finite_differences() -> None:
    case = Selected(num_tokens=3)
    assert gradcheck(case.run, case.leaves, check_batched_grad=True)
    assert gradgradcheck(case.run, case.leaves)


def test_bfloat16_mixes_and_adds_in_float32() -> None:
    case = Selected(num_tokens=40, dtype=torch.bfloat16)
    exact = [leaf.detach().double() for leaf in case.leaves]
    with torch.no_grad():
        # 1 - w would be 0 in bfloat16, and what is expected is a thousand times the token.
        case.leaves[4].fill_(1 - 2**-10)
        exact[4].fill_(1 - 2**-10)
        case.statistics[0].mul_(1000)
    actual = case.run(*case.leaves)
    assert actual.dtype == torch.bfloat16
    case.statistics = [value.double() for value in case.statistics]
    expected = case.loop(*exact)
    assert (actual.double() - expected).norm() < 1e-2 * expected.norm()


def test_autocast_computes_in_bfloat16_and_gives_float32_gradients() -> None:
    case = Selected(num_tokens=40, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = case.run(*case.leaves)
    assert output.dtype == torch.bfloat16
    gradients = torch.autograd.grad(project(output.float()), case.leaves)
    expected = torch.autograd.grad(project(case.loop(*case.leaves)), case.leaves)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - wanted).norm() < 2e-2 * wanted.norm()


def test_neither_mixtures_nor_outputs_are_kept() -> None:
    case = Selected(num_tokens=50, k=4)
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        case.run(*case.leaves)
    inputs = [*case.leaves, *case.statistics, case.index, case.buckets]
    own = sum(kept.values()) - sum(value.untyped_storage().nbytes() for value in inputs)
    num_pairs = 50 * 4
    assert own == num_pairs * (6 + 1) * 8 + NUM_EXPERTS * 4  # gates, order and ends


@pytest.fixture
def in_groups(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Run as on a GPU, with its kernels in torch's own operations."""
    monkeypatch.setattr(selected_mot, "has_pair_kernels", lambda device, dtype: True)
    return monkeypatch


@pytest.mark.parametrize("elements", [2**24, 10])  # all rows at once, and three
def test_groups_of_pairs_give_the_values_and_gradients_of_the_loop(
    elements: int, in_groups: pytest.MonkeyPatch
) -> None:
    in_groups.setattr(gates_mot, "_DOT_ELEMENTS", elements)
    case = Selected(num_tokens=9, k=2, width=16, num_features=16, dtype=torch.float32)  # grouped_mm needs 16 bytes
    outputs = case.run(*case.leaves), case.loop(*case.leaves)
    gradients = (torch.autograd.grad(project(output), case.leaves) for output in outputs)
    for actual, expected in zip((outputs[0], *next(gradients)), (outputs[1], *next(gradients)), strict=True):
        assert (actual - expected).norm() < 1e-5 * expected.norm()


def test_a_cpu_runs_few_pairs_in_groups_and_many_by_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Selected(num_tokens=9, k=2, width=16, num_features=16, dtype=torch.float32)
    seen = []

    def watch(*arguments: Any) -> Tensor:
        seen.append(len(arguments[1]))
        return mix_pairs(*arguments)

    monkeypatch.setattr(selected_mot, "mix_pairs", watch)
    gradients = []
    for elements in (9 * 2 * 16 // NUM_EXPERTS + 1, 9 * 2 * 16 // NUM_EXPERTS - 1):
        monkeypatch.setattr(selected_mot, "_CPU_ELEMENTS_OF_EXPERT", elements)
        gradients.append(torch.autograd.grad(project(case.run(*case.leaves)), case.leaves))
    assert seen == [18, 18]  # forward and backward of the first
    for actual, expected in zip(*gradients, strict=True):
        assert (actual - expected).norm() < 1e-5 * expected.norm()
    monkeypatch.setattr(selected_mot, "_CPU_ELEMENTS_OF_EXPERT", 9 * 2 * 16 // NUM_EXPERTS + 1)
    with torch.no_grad():  # so do steps of decoding
        case.run(*case.leaves)
    assert seen == [18, 18, 18]


def widen(weight: Tensor, by: int) -> Tensor:
    """The same values as a slice of a wider tensor."""
    wide = torch.zeros(*weight.shape[:-1], weight.shape[-1] + by, dtype=weight.dtype)
    wide[..., : weight.shape[-1]] = weight.detach()
    return wide[..., : weight.shape[-1]].requires_grad_()


def scatter(weight: Tensor) -> Tensor:
    """The same values with a gap after each of them."""
    return torch.stack([weight.detach()] * 2, dim=-1)[..., 0].requires_grad_()


@pytest.mark.parametrize("change", [lambda weight: widen(weight, 1), lambda weight: widen(weight, 4), scatter])
@pytest.mark.parametrize("place", [2, 3])
def test_weights_may_lie_in_memory_in_any_way(place: int, change: Callable[[Tensor], Tensor]) -> None:
    case = Selected(num_tokens=9, k=2, width=16, num_features=16, dtype=torch.float32)
    gradients = [torch.autograd.grad(project(case.run(*case.leaves)), case.leaves)]
    case.leaves[place] = change(case.leaves[place])
    assert not case.leaves[place].is_contiguous()
    gradients.append(torch.autograd.grad(project(case.run(*case.leaves)), case.leaves))
    for actual, expected in zip(*gradients, strict=True):
        assert (actual - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(("num_experts", "in_groups"), [(100, True), (101, False)])
def test_one_token_of_very_many_experts_runs_by_the_loop(
    num_experts: int, in_groups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(selected_mot, "mix_pairs", lambda *arguments: seen.append(1) or mix_pairs(*arguments))
    weights = torch.randn(num_experts, 32, 16), torch.randn(num_experts, 16, 16)
    own = OwnMixtures(torch.rand(1, 2), torch.zeros(1).long(), torch.randn(num_experts, 16), torch.randn(1, 16))
    mix_and_run_selected(torch.randn(1, 16), torch.tensor([[3, 7]]), torch.rand(1, 2), own, *weights, F.silu)
    assert bool(seen) is in_groups


@pytest.mark.parametrize("num_rows", [1, 600])  # few pairs, which run in groups, and many
@pytest.mark.parametrize("mode", ["per_sequence", "moe", "cross_example"])
def test_a_hook_may_change_an_output_in_place(mode: str, num_rows: int) -> None:
    logits = []
    for change in (lambda module, inputs, output: output.mul_(2), lambda module, inputs, output: output * 2):
        torch.manual_seed(0)
        model = MoTForCausalLM(tiny_config(mixing=mode))
        block = model.model.layers[-1].mlp
        # Experts that mix return several tensors.
        for module in (block,) if mode == "cross_example" else (block, block.experts):
            module.register_forward_hook(change)
        logits.append(model.train()(random_ids(num_rows, 8)).logits)
        logits[-1].sum().backward()
    assert torch.equal(*logits)


def test_the_backward_pass_of_groups_frees_what_it_has_used(in_groups: pytest.MonkeyPatch) -> None:
    used: list[weakref.ref[Tensor]] = []

    def run(*arguments: Any) -> tuple[Tensor, ...]:
        hidden, grad_gates, dots = gates_mot.run_weighted_gates_backward(*arguments)
        used.extend(map(weakref.ref, (arguments[1], hidden, grad_gates)))
        return hidden, grad_gates, dots

    def dot(*arguments: Any) -> Tensor:
        assert [reference() for reference in used] == [None] * 3
        return dot_pairs(*arguments)

    in_groups.setattr(selected_mot, "run_weighted_gates_backward", run)
    in_groups.setattr(selected_mot, "dot_pairs", dot)
    case = Selected(num_tokens=9, k=2, width=16, num_features=16, dtype=torch.float32)
    project(case.run(*case.leaves)).backward()
    assert len(used) == 3


def test_dot_products_of_rows_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates_mot, "_DOT_ELEMENTS", 64)
    first, second = torch.randn(2, 1000, 16).bfloat16()
    dots = []
    peak = measure_peak_memory(lambda: dots.append(gates_mot._dot_rows(first, second, torch.float32)), "cpu")
    torch.testing.assert_close(dots[0], (first.float() * second.float()).sum(dim=-1))
    assert peak <= 4 * (len(first) + 3 * 64) + 64  # the result, and three copies of a part


class Routed(nn.Module):
    """What a server puts in the place of experts: it knows the routed signature alone."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return self.experts(hidden_states, top_k_index, top_k_weights)


def replace_forward(experts: Any) -> Any:
    """As tensor and expert parallelism do."""
    original = experts.forward
    experts.forward = lambda hidden_states, top_k_index, top_k_weights: original(
        hidden_states, top_k_index, top_k_weights
    )
    return experts


@pytest.mark.parametrize("change", [Routed, replace_forward])
def test_experts_of_others_get_the_routed_signature(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(MoTForCausalLM(tiny_config(num_hidden_layers=2, num_experts_per_tok=2)))
    ids = random_ids(3, 5)

    def run() -> tuple[Tensor, ...]:
        loss = model(ids, labels=ids, mixing="per_sequence").loss
        parameters = [value for name, value in model.named_parameters() if ".mlp." in name]
        return loss, *torch.autograd.grad(loss, parameters)

    expected = run()
    monkeypatch.setattr(modeling_mot, "mix_and_run_selected", None)  # it must not be called
    for layer in model.model.layers:
        if layer.is_sparse:
            layer.mlp.experts = change(layer.mlp.experts)
    torch.testing.assert_close(run(), expected)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_other_implementations_are_taken_at_their_word(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(MoTForCausalLM(tiny_config(num_hidden_layers=2)))
    ids = random_ids(3, 5)
    expected = model(ids, mixing="per_sequence").logits
    monkeypatch.setattr(modeling_mot, "mix_and_run_selected", None)
    model.set_experts_implementation(implementation)
    torch.testing.assert_close(model(ids, mixing="per_sequence").logits, expected)


@needs_triton
def test_kernels_compute_the_same() -> None:
    run_in_interpreter(__name__, "check_kernels")


def check_kernels() -> None:
    for width, dtype in [(7, torch.float32), (7, torch.bfloat16), (1030, torch.float32)]:  # more than a block
        check_kernels_on(torch.randn(5, width).to(dtype))


def check_kernels_on(x: Tensor) -> None:
    index = torch.rand(5, NUM_EXPERTS).topk(2).indices
    weights, buckets = torch.rand(5, 2), torch.randint(NUM_BUCKETS, (5,))
    mean_input, input_shift = torch.randn(NUM_EXPERTS, x.shape[1]), torch.randn(NUM_BUCKETS, x.shape[1])
    mixing = Mixing(x, weights, index, buckets, mean_input, input_shift)
    order, tolerance = sort_pairs(index, NUM_EXPERTS).order, 1e-5 if x.dtype == torch.float32 else 8e-3
    means = mean_input[index] + input_shift[buckets][:, None]  # [S, K, D]
    differences = x[:, None].float() - means
    mixtures = (means + weights[..., None] * differences).flatten(0, 1)  # [M, D]
    rows = mix_in_kernel(mixing, order)
    torch.testing.assert_close(rows.float(), mixtures[order], atol=tolerance, rtol=tolerance)
    values = torch.empty_like(rows)
    values[order] = rows
    by_token = values.float().unflatten(0, index.shape)  # [S, K, D]
    sums = (weights[..., None] * by_token).sum(dim=1)
    torch.testing.assert_close(sum_in_kernel(rows, weights, order).float(), sums, atol=tolerance, rtol=tolerance)
    dots = (by_token * differences).sum(dim=-1)
    torch.testing.assert_close(dot_in_kernel(rows, mixing, order), dots, atol=1e-4, rtol=1e-4)
