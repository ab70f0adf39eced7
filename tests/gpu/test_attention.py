"""Attention implementations against eager attention in float32, in logits and gradients."""

import pytest
import torch
from torch import Tensor

from mot_hf import MoTForCausalLM
from tests.gpu.comparing import PRECISIONS, assert_all_close
from tests.models import random_ids, tiny_config, trained

pytestmark = pytest.mark.gpu

# More than one block of flex_attention.
NUM_COLUMNS = 150
# Gradients of eager attention in bfloat16 are off by 0.03.
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.1}


def make_model(device: str, dtype: str, implementation: str) -> MoTForCausalLM:
    torch.manual_seed(0)
    config = tiny_config(hidden_size=64, num_hidden_layers=2, max_position_embeddings=NUM_COLUMNS)
    model = trained(MoTForCausalLM(config)).train().to(device, PRECISIONS[dtype])
    model.set_attn_implementation(implementation)
    return model


def run(model: MoTForCausalLM, padded: bool) -> dict[str, Tensor]:
    """Logits at tokens, and the gradients."""
    ids = random_ids(4, NUM_COLUMNS).to(model.device)
    num_padding = 40 * padded * torch.arange(4, device=model.device)[:, None]
    mask = (torch.arange(NUM_COLUMNS, device=model.device) >= num_padding).long()
    labels = ids.masked_fill(mask.cumsum(dim=1) < 2, -100)  # what the last column of padding predicts is of no matter
    output = model(ids, attention_mask=mask if padded else None, labels=labels)
    output.loss.backward()
    results = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return {"logits": output.logits[mask.bool()], **results}


@pytest.mark.parametrize(
    ("implementation", "padded", "dtype"),
    [
        ("sdpa", False, "float32"),
        ("sdpa", True, "float32"),
        ("sdpa", False, "bfloat16"),
        ("sdpa", True, "bfloat16"),
        ("flex_attention", True, "float32"),
        ("flex_attention", False, "bfloat16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "padded" if value else "full",
)
def test_implementations_equal_eager_attention(implementation: str, padded: bool, dtype: str, device: str) -> None:
    if implementation == "flex_attention" and device == "cpu":
        pytest.skip("flex_attention has no gradients on a CPU; tests/modeling/test_heads.py has its logits there")
    expected = run(make_model(device, "float32", "eager"), padded)
    actual = run(make_model(device, dtype, implementation), padded)
    assert_all_close(actual, expected, TOLERANCES[dtype])
