"""A model that was trained in bfloat16 on the device is the same after loading."""

from pathlib import Path

import pytest
import torch

from mot_hf import MoTForCausalLM
from tests.models import MODES, companions_of, random_ids, tiny_config, trained

pytestmark = pytest.mark.gpu


def test_a_bfloat16_model_comes_back_with_float32_statistics(tmp_path: Path, device: str) -> None:
    trained(MoTForCausalLM(tiny_config())).save_pretrained(tmp_path / "float32")
    model = MoTForCausalLM.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16).to(device).train()
    ids = random_ids(8, 6).to(device)
    model(ids, labels=ids).loss.backward()
    model.eval().save_pretrained(tmp_path / "bfloat16")
    loaded = MoTForCausalLM.from_pretrained(tmp_path / "bfloat16", dtype=torch.bfloat16).to(device)
    statistics = companions_of(model)
    for name, value in companions_of(loaded).items():
        assert value.dtype == (torch.float32 if value.dtype.is_floating_point else torch.long)
        assert torch.equal(value, statistics[name])
    weights = dict(model.named_parameters())
    for name, value in loaded.named_parameters():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, weights[name])
    for mode in MODES:
        torch.testing.assert_close(loaded(ids, mixing=mode).logits, model(ids, mixing=mode).logits)
