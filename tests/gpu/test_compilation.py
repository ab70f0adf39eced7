"""Compiled training and decoding as one graph each, and as CUDA graphs, step by step against eager mode.

A CPU runs the graphs without compiling them further: `tests/modeling/test_compilation.py` does that there.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import StaticCache

from mot_hf import MoTForCausalLM
from tests.gpu.comparing import PRECISIONS, assert_all_close, move, relative_error
from tests.modeling.test_compilation import make_batches, train_step
from tests.models import random_ids, tiny_config, trained

pytestmark = pytest.mark.gpu

TOLERANCES = {"float32": 1e-4, "bfloat16": 0.1}
NUM_STEPS = 5  # CUDA graphs are warmed up, recorded and replayed


def make_model(device: str, mode: str, experts: str = "grouped_mm", dtype: str = "float32") -> MoTForCausalLM:
    config = tiny_config(mixing=mode, num_hidden_layers=2)
    if dtype == "bfloat16":  # in which compiled code rounds elsewhere and would choose other experts
        config.num_experts_per_tok = config.num_experts
    model = trained(MoTForCausalLM(config)).to(device, PRECISIONS[dtype])
    model.set_experts_implementation(experts)
    return model


def backend_of(device: str) -> str:
    return "eager" if device == "cpu" else "inductor"


def clone(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies: the next replay of a CUDA graph overwrites what the last one made."""
    return {name: value.detach().clone() for name, value in results.items()}


def assert_trains_like_eager(
    model: MoTForCausalLM, padded: bool, tolerance: float, num_steps: int, **options: Any
) -> None:
    """Compare loss, logits, gradients and statistics of every step, with an optimizer that moves the parameters."""
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, **options)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.05) for each in (model, eager)]
    batches = make_batches(padded, num_rows=6 if padded else 8)
    for step in range(num_steps):
        inputs = move(batches[step % len(batches)], str(model.device))
        torch.compiler.cudagraph_mark_step_begin()
        actual = clone(train_step(model, compiled, inputs, use_cache=False))
        expected = train_step(eager, eager, inputs, use_cache=False)
        assert_all_close(actual, expected, tolerance)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize(
    ("mode", "padded", "experts", "dtype"),
    [
        ("cross_example", False, "grouped_mm", "float32"),
        ("cross_example", True, "grouped_mm", "float32"),
        ("cross_example", False, "grouped_mm", "bfloat16"),
        ("per_sequence", True, "batched_mm", "float32"),
        ("per_sequence", True, "grouped_mm", "bfloat16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "padded" if value else "full",
)
def test_training_is_one_graph(mode: str, padded: bool, experts: str, dtype: str, device: str) -> None:
    model = make_model(device, mode, experts, dtype).train()
    counter = CompileCounterWithBackend(backend_of(device))
    assert_trains_like_eager(model, padded, TOLERANCES[dtype], num_steps=2, backend=counter)
    assert counter.frame_count == 1


@torch.no_grad()
def assert_decodes_like_eager(model: MoTForCausalLM, mixing: str, **options: Any) -> None:
    """Decode token by token with a static cache, against one pass over all."""
    compiled = torch.compile(model, fullgraph=True, **options)
    ids = random_ids(2, 12).to(model.device)
    expected = model(ids, mixing=mixing).logits
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(ids[:, :4], past_key_values=cache, mixing=mixing)
    for column in range(4, 12):
        torch.compiler.cudagraph_mark_step_begin()
        position_ids = torch.tensor([[column]], device=model.device)
        step = {"input_ids": ids[:, column, None], "position_ids": position_ids, "past_key_values": cache}
        logits = compiled(**step, mixing=mixing).logits.clone()
        assert relative_error(logits[:, 0], expected[:, column]) <= 1e-4


@pytest.mark.parametrize(("mode", "experts"), [("per_sequence", "batched_mm"), ("moe", "batched_mm")])
def test_decoding_is_one_graph(mode: str, experts: str, device: str) -> None:
    counter = CompileCounterWithBackend(backend_of(device))
    assert_decodes_like_eager(make_model(device, mode, experts), mode, backend=counter)
    assert counter.frame_count == 1


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_training_runs_as_cuda_graphs(padded: bool, device: str) -> None:
    if device == "cpu":
        pytest.skip("a CPU has no CUDA graphs")
    counters.clear()
    model = make_model(device, "cross_example").train()
    assert_trains_like_eager(model, padded, TOLERANCES["float32"], NUM_STEPS, mode="reduce-overhead")
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_decoding_runs_as_cuda_graphs(device: str) -> None:
    if device == "cpu":
        pytest.skip("a CPU has no CUDA graphs")
    counters.clear()
    assert_decodes_like_eager(make_model(device, "per_sequence", "batched_mm"), "per_sequence", mode="reduce-overhead")
    assert counters["inductor"]["cudagraph_skips"] == 0
