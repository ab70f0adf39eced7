"""`torch.compile(fullgraph=True)`: one graph without breaks, and the results of eager mode."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config as inductor_config
from transformers import StaticCache

from mot_hf import MoTForCausalLM, MoTForMaskedLM, MoTPreTrainedModel
from tests.compiling import fresh_compiler
from tests.models import companions_of, random_ids, tiny_config, trained

slow = pytest.mark.slow
# Compiling takes time for each layer, and the graphs of all are the same.
ONE_LAYER: dict[str, Any] = {"num_hidden_layers": 1, "mlp_layer_types": ["sparse"]}
# Compiled in half the time; memory is shared and values are kept for the backward pass as with others.
SCALAR_KERNELS = inductor_config.patch({"cpp.simdlen": 1})


@pytest.fixture(autouse=True)
def compiler() -> Iterator[None]:
    with fresh_compiler():
        yield


def train_step(model: MoTPreTrainedModel, forward: nn.Module, inputs: dict[str, Tensor], **arguments: Any) -> dict:
    """Loss, logits, gradients and statistics after one forward and backward pass."""
    model.zero_grad()
    outputs = forward(**inputs, **arguments)
    outputs.loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters()}
    return {"loss": outputs.loss, "logits": outputs.logits} | gradients | companions_of(model)


def assert_compiles(
    model: MoTPreTrainedModel, backend: str, batches: list[dict[str, Tensor]], **arguments: Any
) -> None:
    eager = copy.deepcopy(model)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for inputs in batches:
        actual = train_step(model, compiled, inputs, **arguments)
        expected = train_step(eager, eager, inputs, **arguments)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    assert counter.frame_count == 1


def make_batches(padded: bool, num_rows: int = 6) -> list[dict[str, Tensor]]:
    batches = []
    for seed in range(2):
        ids = random_ids(num_rows, 5, seed=seed)
        batches.append({"input_ids": ids, "labels": ids})
        if padded:
            num_padding = (torch.arange(num_rows)[:, None] + seed) % 3
            batches[-1]["attention_mask"] = (torch.arange(5) >= num_padding).long()
    return batches


@pytest.mark.parametrize("mode", ["cross_example", "per_sequence"])
def test_another_activation_is_not_taken_for_silu(mode: str) -> None:
    """The operators that a graph may hold know one activation."""
    model = trained(MoTForCausalLM(tiny_config(hidden_act="gelu", moe_intermediate_size=16, **ONE_LAYER))).train()
    assert_compiles(model, "eager", make_batches(padded=False)[:1], mixing=mode)


@pytest.mark.parametrize(
    ("head", "padded", "num_layers"),
    [(MoTForCausalLM, False, 2), (MoTForCausalLM, True, 4), (MoTForMaskedLM, True, 2)],
)
def test_cross_example_trains_in_one_graph(head: type[MoTPreTrainedModel], padded: bool, num_layers: int) -> None:
    model = trained(head(tiny_config(num_hidden_layers=num_layers))).train()
    before = companions_of(model)
    assert_compiles(model, "aot_eager", make_batches(padded))
    after = companions_of(model)
    counts = [name for name in after if name.endswith("num_batches_tracked")]
    assert [after[name].item() - before[name].item() for name in counts] == [2] * (num_layers // 2)


@slow
def test_two_passes_before_one_backward_pass_have_the_gradients_of_each() -> None:
    model = trained(MoTForCausalLM(tiny_config(**ONE_LAYER))).train()
    eager, counter = copy.deepcopy(model), CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for batches in [make_batches(padded=True), make_batches(padded=False)]:
        with SCALAR_KERNELS:
            first, second = (compiled(**inputs) for inputs in batches)
            (first.loss + second.loss).backward()
        for inputs, actual in zip(batches, (first, second), strict=True):
            expected = eager(**inputs)
            expected.loss.backward()
            torch.testing.assert_close(actual.logits, expected.logits, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(actual.loss, expected.loss, atol=1e-5, rtol=1e-4)
        gradients = ({name: value.grad for name, value in one.named_parameters()} for one in (model, eager))
        torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(companions_of(model), companions_of(eager), atol=1e-5, rtol=1e-4)
    assert counter.frame_count == 2  # with a mask and without


def test_full_groups_train_in_one_graph() -> None:
    model = trained(MoTForCausalLM(tiny_config(**ONE_LAYER))).train()
    assert_compiles(model, "aot_eager", make_batches(padded=False, num_rows=8))


@pytest.mark.parametrize(
    ("mode", "experts", "backend"),
    [
        ("per_sequence", "grouped_mm", "aot_eager"),
        ("per_sequence", "batched_mm", "aot_eager"),
        ("moe", "grouped_mm", "aot_eager"),
        ("moe", "batched_mm", "aot_eager"),
        pytest.param("per_sequence", "grouped_mm", "inductor", marks=slow),
    ],
)
def test_routed_modes_train_in_one_graph(mode: str, experts: str, backend: str) -> None:
    if experts == "grouped_mm" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("transformers 5.17 cannot compile the gradient of float32 grouped_mm, in Qwen3-MoE either")
    is_balanced = mode == "moe"  # with the loss of transition tuning
    model = trained(MoTForCausalLM(tiny_config(mixing=mode, output_router_logits=is_balanced, **ONE_LAYER))).train()
    model.set_experts_implementation(experts)
    assert_compiles(model, backend, make_batches(padded=True))


@pytest.mark.parametrize(
    ("mode", "experts", "backend"),
    [
        ("per_sequence", "grouped_mm", "aot_eager"),
        ("per_sequence", "batched_mm", "aot_eager"),
        ("moe", "grouped_mm", "aot_eager"),
        ("cross_example", "grouped_mm", "aot_eager"),
        pytest.param("per_sequence", "grouped_mm", "inductor", marks=slow),
    ],
)
@torch.no_grad()
def test_decoding_with_a_static_cache_is_one_graph(mode: str, experts: str, backend: str) -> None:
    model = trained(MoTForCausalLM(tiny_config(**ONE_LAYER)))
    model.set_experts_implementation(experts)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    ids = random_ids(2, 9)
    expected = model(ids, mixing=mode).logits
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(ids[:, :4], past_key_values=cache, mixing=mode)
    for column in range(4, 9):
        step = {"input_ids": ids[:, column, None], "position_ids": torch.tensor([[column]])}
        logits = compiled(**step, past_key_values=cache, mixing=mode).logits
        torch.testing.assert_close(logits[:, 0], expected[:, column], atol=1e-5, rtol=1e-4)
    assert counter.frame_count == 1
