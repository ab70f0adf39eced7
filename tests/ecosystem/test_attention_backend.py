"""How vLLM and SGLang call a model of transformers: one row of all requests, and attention of their own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModel

from mot_hf import MoTForCausalLM
from tests.models import random_ids, tiny_config, trained

LENGTHS = (7, 1, 5)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention as such a server registers it: by layer, from what it hands to the model beside the inputs."""
    assert attention_mask is None
    num_repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(num_repeats, dim=1), value.repeat_interleave(num_repeats, dim=1)
    attention = kwargs["attention_instances"][module.layer_idx]
    return attention(query, key, value, scale=kwargs["scaling"]).transpose(1, 2), None


def attention_of_requests() -> Callable[..., Tensor]:
    owner = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    mask = (owner[:, None] == owner) & torch.ones(sum(LENGTHS), sum(LENGTHS), dtype=torch.bool).tril()
    return lambda *states, scale: F.scaled_dot_product_attention(*states, attn_mask=mask, scale=scale)


@pytest.mark.parametrize("mode", ["per_sequence", "moe"])
@torch.no_grad()
def test_requests_of_a_server_get_what_they_get_alone(mode: str, tmp_path: Path) -> None:
    expected = trained(MoTForCausalLM(tiny_config()))
    expected.set_mixing(inference_mixing=mode).save_pretrained(tmp_path)
    AttentionInterface.register("server", attend)
    config = AutoConfig.from_pretrained(tmp_path)
    config._attn_implementation = "server"
    backbone = AutoModel.from_config(config).eval()
    backbone.load_state_dict(expected.model.state_dict())
    assert backbone.is_backend_compatible()

    requests = [random_ids(1, length, seed=length) for length in LENGTHS]
    instances = dict.fromkeys(range(config.num_hidden_layers), attention_of_requests())
    hidden_states = backbone(
        input_ids=torch.cat(requests, dim=1),
        position_ids=torch.cat([torch.arange(length) for length in LENGTHS])[None],
        use_cache=False,
        return_dict=False,
        attention_instances=instances,
    )[0]
    alone = [expected.model(request).last_hidden_state for request in requests]
    torch.testing.assert_close(hidden_states, torch.cat(alone, dim=1), atol=1e-5, rtol=1e-5)
