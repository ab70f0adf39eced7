"""The plans by which models are spread over processes, and the numbers of processes that they refuse."""

import re

import pytest
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from mot_hf import (
    MoTForCausalLM,
    MoTForMaskedLM,
    MoTForQuestionAnswering,
    MoTForSequenceClassification,
    MoTForTokenClassification,
    MoTModel,
    MoTPreTrainedModel,
)
from tests.models import tiny_config
from tests.processes import pretend, spread

HEADS = [
    *(MoTModel, MoTForCausalLM, MoTForMaskedLM),
    *(MoTForSequenceClassification, MoTForTokenClassification, MoTForQuestionAnswering),
]
EXPERT_WEIGHTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
has_expert_plan = pytest.mark.skipif(
    "ep_size" not in DistributedConfig.__dataclass_fields__, reason="this transformers has another expert parallelism"
)


@pytest.mark.parametrize("head", HEADS)
def test_the_plan_of_tensor_parallelism_names_every_large_weight(head: type[MoTPreTrainedModel]) -> None:
    model = head(tiny_config(num_experts=16))
    plan = {name.replace("*", r"\d+") for name in model.tp_plan}
    # Routers, norms and small heads are whole in every process; the embedding's rule is transformers' own.
    whole = ("mlp.gate.weight", "norm.weight", "score.weight", "embed_tokens.weight", "qa_outputs.weight", ".bias")
    for name, _ in model.named_parameters():
        is_planned = any(re.fullmatch(rf"{rule}(\.weight)?", name) for rule in plan)
        assert is_planned or name.endswith(whole), name


@has_expert_plan
def test_the_plan_of_expert_parallelism_names_the_experts_and_nothing_else() -> None:
    model = MoTForCausalLM(tiny_config())
    names = {f"model.layers.*.{name}" for name in (*EXPERT_WEIGHTS, "mlp.experts")}
    assert set(model.ep_plan) == names


@has_expert_plan
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    "sizes",
    [
        {"tp_size": 2},
        {"tp_size": 2, "ep_size": 2},
        {"fsdp_size": 8},
        {"fsdp_size": 8, "ep_size": 8},
        {"fsdp_size": 8, "ep_size": 4},
        {"tp_size": 2, "fsdp_size": 4},
        {"tp_size": 2, "fsdp_size": 4, "ep_size": 8},
        {"tp_size": 2, "fsdp_size": 4, "ep_size": 4},
    ],
    ids=str,
)
def test_no_weight_of_experts_or_of_a_language_model_is_whole(
    head: type[MoTPreTrainedModel], sizes: dict[str, int]
) -> None:
    config = tiny_config(vocab_size=96, moe_intermediate_size=24)
    num_processes = sizes.get("tp_size", 1) * sizes.get("fsdp_size", 1)
    with pretend(num_processes):
        model = spread(head, config, **sizes)
        shares = {
            name: value.numel() / value.to_local().numel()
            for name, value in model.named_parameters()
            if isinstance(value, DTensor)
        }
    experts = {name: share for name, share in shares.items() if name.endswith(EXPERT_WEIGHTS)}
    assert len(experts) == 4
    assert set(experts.values()) == {num_processes}
    # Norms, routers and small heads are whole in processes that share a batch.
    large = {name for name, value in model.named_parameters() if value.ndim > 1 and min(value.shape) > 8}
    assert {shares.get(name) for name in large} == {num_processes}


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"tp_size": 4}, r"`tp_size=4` must divide `num_key_value_heads` \(2\), .*: set it to 1 or 2\."),
        ({"tp_size": 3}, r"`tp_size=3` must divide `num_key_value_heads` \(2\), .*: set it to 1 or 2\."),
        ({"tp_size": 8, "fsdp_size": 2}, r"`tp_size=8` must divide .* \(2\), .*: set it to 1 or 2\."),
        ({"tp_size": 2, "fsdp_size": 4}, r"`vocab_size=97` cannot be .* tp_size=2 and fsdp_size=4 .* such as 104, or"),
        pytest.param(
            {"fsdp_size": 3, "ep_size": 3},
            r"`ep_size=3` must divide `num_experts` \(8\), .*: set it to 1 or 2\.",
            marks=has_expert_plan,
        ),
        pytest.param(
            {"fsdp_size": 16, "ep_size": 16},
            r"`ep_size=16` must divide `num_experts` \(8\), .*: set it to 1 or 2 or 4 or 8\.",
            marks=has_expert_plan,
        ),
        pytest.param(
            {"fsdp_size": 6, "ep_size": 6},
            r"`ep_size=6` must divide `num_experts` \(8\), .*: set it to 1 or 2 or 4\.",
            marks=has_expert_plan,
        ),
    ],
)
def test_numbers_that_do_not_divide_the_model_are_refused(sizes: dict[str, int], reason: str) -> None:
    model = MoTForCausalLM(tiny_config())
    # No processes are needed for it: nothing is spread before.
    with pytest.raises(ValueError, match=reason):
        MoTForCausalLM.maybe_distribute_model(model, DistributedConfig(**sizes), None)


@pytest.mark.skipif(
    "ep_size" in DistributedConfig.__dataclass_fields__,
    reason="this transformers has one that suits",
)
def test_an_expert_parallelism_that_cannot_mix_is_refused() -> None:
    model = MoTForCausalLM(tiny_config())
    config = DistributedConfig(tp_size=2, enable_expert_parallel=True)
    with pytest.raises(ValueError, match=r"needs transformers 5\.19 or newer"):
        MoTForCausalLM.maybe_distribute_model(model, config, None)
