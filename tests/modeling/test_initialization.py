"""What a new model's weights are drawn from."""

import pytest
import torch

from mot_hf import MoTForCausalLM
from mot_hf.modeling.mixing_mot import MoTRouter
from tests.models import random_ids, tiny_config


def routers(width: int, **fields: float) -> list[MoTRouter]:
    torch.manual_seed(0)
    config = tiny_config(hidden_size=width, intermediate_size=width, num_experts=64, group_size=32, **fields)
    return [module for module in MoTForCausalLM(config).modules() if isinstance(module, MoTRouter)]


@pytest.mark.parametrize("width", [32, 128, 512])
def test_logits_of_normalised_tokens_have_a_standard_deviation_of_two(width: int) -> None:
    tokens = torch.nn.functional.rms_norm(torch.randn(8, 16, width), (width,))
    for router in routers(width, router_initializer_range=None):
        assert router(tokens).std().item() == pytest.approx(2, rel=0.1)


def test_the_paper_draws_controllers_as_all_other_weights() -> None:
    for router in routers(128, initializer_range=0.02, router_initializer_range=0.02):
        assert router.weight.std().item() == pytest.approx(0.02, rel=0.05)


def effective_tokens(router_initializer_range: float | None) -> float:
    """Mean number of a group's 32 tokens that make up an expert's mixture in a new model."""
    torch.manual_seed(0)
    fields = {"initializer_range": 0.02, "router_initializer_range": router_initializer_range}
    model = MoTForCausalLM(tiny_config(hidden_size=64, num_experts=64, group_size=32, **fields)).train()
    logits = model(random_ids(32, 16), output_router_logits=True).router_logits[-1]
    entropy = torch.distributions.Categorical(logits=logits.unflatten(0, (32, 16)).permute(1, 2, 0)).entropy()
    return entropy.exp().mean().item()


def test_experts_of_a_new_model_get_a_few_tokens_each_and_by_the_paper_almost_all() -> None:
    assert effective_tokens(None) < 14
    assert effective_tokens(0.02) > 30
