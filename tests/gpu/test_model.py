"""A training step of a whole model: the device against the CPU, and autocast against float32."""

import copy

import pytest
import torch

from mot_hf import MoTForCausalLM
from tests.gpu.comparing import assert_all_close, move, relative_error
from tests.modeling.test_compilation import make_batches, train_step
from tests.models import MODES, companions_of, tiny_config, trained

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("mode", MODES)
def test_losses_gradients_and_statistics_are_those_of_a_cpu(mode: str, padded: bool, device: str) -> None:
    model = trained(MoTForCausalLM(tiny_config())).train()
    on_device = copy.deepcopy(model).to(device)
    for inputs in make_batches(padded, num_rows=8):
        expected = train_step(model, model, inputs, mixing=mode)
        actual = train_step(on_device, on_device, move(inputs, device), mixing=mode)
        assert_all_close(actual, expected, tolerance=1e-4)


def test_a_batch_of_padding_alone_leaves_the_statistics(device: str) -> None:
    model = trained(MoTForCausalLM(tiny_config())).train().to(device)
    before = companions_of(model)
    ids = torch.full((4, 5), 2, device=device)
    logits = model(ids, attention_mask=torch.zeros_like(ids)).logits
    assert logits.isfinite().all()
    for name, value in companions_of(model).items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("mode", MODES)
def test_autocast_is_as_precise_as_bfloat16(mode: str, device: str) -> None:
    model = trained(MoTForCausalLM(tiny_config())).train().to(device)
    inputs = move(make_batches(padded=True)[0], device)
    expected = model(**inputs, mixing=mode).loss
    with torch.autocast(device, torch.bfloat16):
        actual = model(**inputs, mixing=mode).loss
    actual.backward()
    assert relative_error(actual, expected) < 2e-2
    assert all(value.grad.isfinite().all() for value in model.parameters() if value.grad is not None)
    assert all(value.isfinite().all() for value in companions_of(model).values())
