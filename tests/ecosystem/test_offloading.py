"""Models that do not fit into memory: accelerate leaves their layers on disk until they are needed."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from mot_hf import MoTForCausalLM
from tests.models import MODES, random_ids, tiny_config, trained


@torch.no_grad()
def test_a_model_half_on_disk_answers_the_same(tmp_path: Path) -> None:
    model = trained(MoTForCausalLM(tiny_config(hidden_size=64, intermediate_size=256, num_hidden_layers=6)))
    model.save_pretrained(tmp_path / "model")
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    arguments = {"max_memory": {"cpu": num_bytes // 2}, "offload_folder": str(tmp_path / "disk")}
    offloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map="auto", **arguments)
    assert set(offloaded.hf_device_map.values()) == {"cpu", "disk"}
    ids = random_ids(6, 10)
    for mode in MODES:
        expected = model(ids, mixing=mode).logits
        torch.testing.assert_close(offloaded(ids, mixing=mode).logits, expected, atol=1e-5, rtol=1e-5)
    greedy = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(offloaded.generate(ids[:2], **greedy), model.generate(ids[:2], **greedy))
