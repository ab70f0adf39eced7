"""`generate()` with a static cache, which transformers compiles on a GPU, gives what it gives with a dynamic one."""

import pytest
import torch

from mot_hf import MoTForCausalLM
from tests.modeling.test_generation import Continuation, continue_greedily, padded_on_the_left
from tests.models import MODES, random_ids, tiny_config, trained

pytestmark = pytest.mark.gpu


@pytest.fixture
def model(device: str) -> MoTForCausalLM:
    return trained(MoTForCausalLM(tiny_config())).to(device)


def generate(model: MoTForCausalLM, mode: str, padded: bool, cache: str, compiled: bool = False) -> Continuation:
    lengths = [5 - 2 * row * padded for row in range(3)]
    inputs = padded_on_the_left([random_ids(1, length, seed=length)[0] for length in lengths], 5)
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    return continue_greedily(model, **inputs, mixing=mode, cache_implementation=cache, disable_compile=not compiled)


def assert_same(actual: Continuation, expected: Continuation) -> None:
    assert torch.equal(actual.tokens, expected.tokens)
    torch.testing.assert_close(actual.logits, expected.logits, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_static_and_dynamic_cache_agree(model: MoTForCausalLM, mode: str, padded: bool) -> None:
    assert_same(generate(model, mode, padded, "static"), generate(model, mode, padded, "dynamic"))


@pytest.mark.parametrize("mode", ["per_sequence", "moe"])
@torch.no_grad()
def test_compiled_generation_agrees(model: MoTForCausalLM, mode: str) -> None:
    if model.device.type != "cuda":
        pytest.skip("transformers compiles generation on GPUs only")
    actual = generate(model, mode, padded=True, cache="static", compiled=True)
    assert hasattr(model, "_compiled_call")
    assert_same(actual, generate(model, mode, padded=True, cache="dynamic"))
