"""What a run is said to cost, against what it costs."""

import json
from itertools import product
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from mot_hf import MoTConfig, MoTForCausalLM
from mot_hf.training import CorpusArguments, MethodArguments, ModelArguments
from mot_hf.training.estimate import (
    EstimateArguments,
    check_layout_is_given,
    count_traffic,
    estimate_memory,
    estimate_run,
)
from scripts.benchmarks.measuring import measure_peak_memory

SIZES = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
NUM_ROWS, NUM_COLUMNS = 16, 32
ON_CPU = EstimateArguments(device_type="cpu")


def make_args(**changes: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir="unused", per_device_train_batch_size=NUM_ROWS, report_to="none", use_cpu=True, **changes
    )


def make_model(device: str, **changes: Any) -> MoTForCausalLM:
    config = MoTConfig(**SIZES, **{"group_size": 8, "num_experts": 8, "vocab_size": 512, **changes})
    with torch.device(device):
        return MoTForCausalLM(config)


CONFIGURATIONS = {
    "as many experts as rows": {},
    "many experts": {"num_experts": 64},
    "a group of padding": {"group_size": 32, "num_experts": 32},
    "dense": {"mlp_layer_types": ["dense", "dense"]},
    "large vocabulary": {"vocab_size": 8192, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize(("bf16", "checkpointing"), [(False, False), (True, True)])
def test_memory_is_that_of_a_step(name: str, bf16: bool, checkpointing: bool) -> None:
    args = make_args(bf16=bf16, gradient_checkpointing=checkpointing)
    memory = estimate_memory(make_model("meta", **CONFIGURATIONS[name]), NUM_COLUMNS, ON_CPU, args)

    model = make_model("cpu", **CONFIGURATIONS[name]).train()
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    ids = torch.randint(512, (NUM_ROWS, NUM_COLUMNS))

    def train() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()

    train()
    assert memory.activations is not None
    assert memory.activations == pytest.approx(measure_peak_memory(train, "cpu"), rel=0.15)
    assert memory.weights == sum(value.nbytes for value in (*model.parameters(), *model.buffers()))
    assert memory.gradients == sum(parameter.nbytes for parameter in model.parameters())
    assert memory.optimizer == 2 * memory.gradients


def test_devices_divide_what_they_share() -> None:
    model = make_model("meta", num_experts=64)
    args, total = make_args(), sum(parameter.nbytes for parameter in model.parameters())
    in_experts = 64 * 3 * 64 * (192 * 8 // 64) * 4  # in one of two layers
    alone = estimate_memory(model, NUM_COLUMNS, ON_CPU, args)
    held = {"ddp": total, "fsdp": total / 4, "ep": total - in_experts * 3 / 4}
    for sharding, num_bytes in held.items():
        memory = estimate_memory(model, NUM_COLUMNS, EstimateArguments(4, sharding, "cpu"), args)
        assert memory.gradients == num_bytes
        assert memory.activations == alone.activations
    assert alone.total() == sum(value for value in alone if value is not None)


def test_traffic_counts_parameters_and_vectors() -> None:
    model = make_model("meta", num_experts=64)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    in_experts = 64 * 3 * 64 * (192 * 8 // 64)
    args = make_args(gradient_accumulation_steps=3)
    vectors = 3 * NUM_ROWS * NUM_COLUMNS * 64 / 8
    expected = {
        "ddp": 2 * 4 * num_parameters,
        "fsdp": 3 * 3 * 4 * num_parameters,
        "ep": 4 * vectors * 64 * 4 + 2 * 4 * (num_parameters - in_experts),
    }
    for sharding, num_bytes in expected.items():
        sent = count_traffic(model, NUM_COLUMNS, EstimateArguments(4, sharding), args)
        assert sent == pytest.approx(num_bytes * 3 / 4)


def test_modes_whose_memory_depends_on_the_text_are_not_guessed() -> None:
    for mode, optimizer in product(["moe", "per_sequence"], ["adamw_torch", "adafactor"]):
        memory = estimate_memory(make_model("meta", mixing=mode), NUM_COLUMNS, ON_CPU, make_args(optim=optimizer))
        assert (memory.activations, memory.total()) == (None, None)
        assert (memory.optimizer is None) == (optimizer == "adafactor")


def test_rows_of_the_table() -> None:
    arguments = (ModelArguments(**SIZES, num_experts=32), CorpusArguments(block_length=NUM_COLUMNS, vocab_size=512))
    devices = EstimateArguments(devices=4, sharding="fsdp", tflops=2.0)
    rows = {row["quantity"]: row["value"] for row in estimate_run(*arguments, devices, make_args(max_steps=10))}
    assert rows["tokens of a step"] == 4 * NUM_ROWS * NUM_COLUMNS
    flops = rows["forward pass in mode cross_example"]
    assert rows["products of a step, at least"] == pytest.approx(3 * flops * NUM_ROWS * NUM_COLUMNS / 2e6)
    assert rows["forward pass in mode moe"] < rows["forward pass in mode per_sequence"] < flops
    assert rows["memory of a device: gathered"] > 0
    json.dumps(rows)


@pytest.mark.parametrize(
    ("devices", "model", "message"),
    [
        ({"devices": 0}, {}, "`devices=0` must be at least 1"),
        ({"tflops": -1.0}, {}, "`tflops=-1.0` must be greater than 0"),
        ({"devices": 3, "sharding": "ep"}, {}, "`num_experts=32` is not a multiple of `devices=3`"),
        ({}, {"model_name_or_path": "runs/clm"}, "estimate a new model"),
    ],
)
def test_what_does_not_fit_is_refused(devices: dict[str, Any], model: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate_run(
            ModelArguments(**SIZES, num_experts=32, **model),
            CorpusArguments(),
            EstimateArguments(**devices),
            make_args(),
        )


def test_a_run_on_many_devices_is_not_taken_for_one_on_a_single_device() -> None:
    check_layout_is_given(EstimateArguments(), MethodArguments())
    check_layout_is_given(EstimateArguments(devices=8, sharding="ep"), MethodArguments(fsdp_size=8, ep_size=8))
    with pytest.raises(ValueError, match="`ep_size=8`, `fsdp_size=8` cannot be estimated as they are: say --devices"):
        check_layout_is_given(EstimateArguments(), MethodArguments(fsdp_size=8, ep_size=8))
