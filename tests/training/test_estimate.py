"""What a run is said to cost, against what it costs."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments
from transformers.distributed import DistributedConfig

from mot_hf import MoTConfig, MoTForCausalLM
from mot_hf.data.tokenizer import train_tokenizer
from mot_hf.training import CorpusArguments, MethodArguments, ModelArguments
from mot_hf.training.estimate import (
    EstimateArguments,
    Memory,
    estimate_memory,
    estimate_run,
    find_layout,
    find_vocab_size,
)
from mot_hf.training.layout import Layout, count_held, count_sent_bytes
from scripts.benchmarks.measuring import measure_peak_memory
from tests.processes import pretend, spread
from tests.training.language_runs import plain_tokenizer

SIZES = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
NUM_ROWS, NUM_COLUMNS = 16, 32
# Parameters of the experts at E = 64, in one of the two layers.
IN_EXPERTS = 64 * 3 * 64 * (192 * 8 // 64)
has_expert_plan = pytest.mark.skipif(
    "ep_size" not in DistributedConfig.__dataclass_fields__, reason="this transformers has another expert parallelism"
)


def make_args(**changes: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir="unused", per_device_train_batch_size=NUM_ROWS, report_to="none", use_cpu=True, **changes
    )


def make_model(device: str, **changes: Any) -> MoTForCausalLM:
    config = MoTConfig(**SIZES, **{"group_size": 8, "num_experts": 8, "vocab_size": 512, **changes})
    with torch.device(device):
        return MoTForCausalLM(config)


def memory_of(model: MoTForCausalLM, layout: Layout, args: TrainingArguments) -> Memory:
    return estimate_memory(model, NUM_COLUMNS, layout, args, is_on_gpu=False)


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
    memory = memory_of(make_model("meta", **CONFIGURATIONS[name]), Layout(), args)

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
    alone = memory_of(model, Layout(), args)
    held = {
        Layout(4): total,
        Layout(4, fsdp=4): total / 4,
        Layout(4, ep=4): total - IN_EXPERTS * 4 * 3 / 4,
        Layout(4, fsdp=4, ep=4): total / 4,
    }
    for layout, num_bytes in held.items():
        assert memory_of(model, layout, args).gradients == num_bytes
    assert memory_of(model, Layout(4, fsdp=4), args).activations == alone.activations
    assert alone.total() == sum(value for value in alone if value is not None)


def test_gradients_of_several_micro_batches_are_whole_until_the_last() -> None:
    model = make_model("meta", num_experts=64)
    total, args = sum(parameter.nbytes for parameter in model.parameters()), make_args(gradient_accumulation_steps=2)
    assert memory_of(model, Layout(4, fsdp=4), args).gradients == total
    assert memory_of(model, Layout(4, fsdp=4, ep=4), args).gradients == total - IN_EXPERTS * 4 * 3 / 4
    assert memory_of(model, Layout(4), args).gradients == total


@has_expert_plan
@pytest.mark.parametrize(
    "sizes",
    [
        {"tp_size": 2},
        {"tp_size": 2, "ep_size": 2},
        {"fsdp_size": 8},
        {"fsdp_size": 8, "ep_size": 8},
        {"fsdp_size": 8, "ep_size": 2},
        {"tp_size": 2, "fsdp_size": 4, "ep_size": 8},
        {"tp_size": 2, "fsdp_size": 4, "ep_size": 4},
    ],
    ids=str,
)
def test_a_device_holds_the_shards_that_transformers_makes(sizes: dict[str, int]) -> None:
    whole = make_model("meta", num_experts=64)
    layout = find_layout(EstimateArguments(), MethodArguments(**sizes), whole.config)
    with pretend(layout.devices):
        model = spread(MoTForCausalLM, whole.config, **sizes)
        shards = [value.to_local() if isinstance(value, DTensor) else value for value in model.parameters()]
    assert count_held(whole, layout) == sum(value.numel() for value in shards)


@has_expert_plan
def test_shards_and_gathered_weights_by_hand() -> None:
    # D = 64, dense width 192, 512 words, 4 heads of width 16; a dense block and one with E = 64 experts of width 24.
    attention, dense, experts, router = 4 * 64 * 64, 3 * 64 * 192, 64 * 3 * 64 * 24, 64 * 64
    norms, words = 2 * (2 * 64 + 2 * 16) + 64, 512 * 64
    model = make_model("meta", num_experts=64)
    assert count_held(model, Layout()) == 2 * attention + dense + experts + router + norms + 2 * words
    # 2 processes share every batch, 4 have batches of their own, and 4 have all experts together: 2 have the same.
    layout = Layout(8, tp=2, fsdp=4, ep=4)
    divided = 2 * attention + dense + 2 * words
    assert count_held(model, layout) == divided / 8 + experts / 4 / 2 + (router + norms) / 4
    block = attention / 2 + experts / 4 + router + (2 * 64 + 2 * 16)
    # Two blocks, gradients of one, these again in float32, and the head.
    assert memory_of(model, layout, make_args()).gathered == 4 * 4 * block + 4 * words / 2
    assert memory_of(model, layout, make_args(bf16=True)).gathered == (3 * 2 + 4) * block + 2 * words / 2
    # If every process has experts of its own, they are not gathered: the largest part is the dense block.
    block = attention + dense + 2 * 64 + 2 * 16
    assert memory_of(model, Layout(8, fsdp=8, ep=8), make_args()).gathered == 4 * 4 * block + 4 * words


def test_traffic_counts_parameters_and_vectors() -> None:
    model = make_model("meta", num_experts=64)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    dense, tokens = num_parameters - IN_EXPERTS, NUM_ROWS * NUM_COLUMNS
    exchanged = 4 * 3 * tokens * 64 / 8 * 64 * 4
    # Weights are gathered twice for each of three micro-batches, those of the head once.
    of_dense = (3 * 2 + 1) * 4 * dense - 3 * 4 * 512 * 64
    expected = {
        Layout(4): 2 * 4 * num_parameters * 3 / 4,
        Layout(4, fsdp=4): (of_dense + (3 * 2 + 1) * 4 * IN_EXPERTS) * 3 / 4,
        Layout(4, ep=4): (exchanged + 2 * 4 * dense) * 3 / 4,
        Layout(4, fsdp=4, ep=4): (exchanged + of_dense) * 3 / 4,
        Layout(4, fsdp=4, ep=2): exchanged / 2 + of_dense * 3 / 4 + (3 * 2 + 1) * 4 * IN_EXPERTS / 2 / 2,
    }
    for layout, num_bytes in expected.items():
        assert count_sent_bytes(model, layout, tokens, 3, bf16=False, checkpointing=False) == pytest.approx(num_bytes)
    rounded = count_sent_bytes(model, Layout(4, fsdp=4), tokens, 1, bf16=True, checkpointing=False)
    assert rounded == pytest.approx(((2 * 2 + 4) * num_parameters - 2 * 512 * 64) * 3 / 4)
    again = count_sent_bytes(model, Layout(4, ep=4), tokens, 3, bf16=False, checkpointing=True)
    assert again == pytest.approx((1.5 * exchanged + 2 * 4 * dense) * 3 / 4)


def test_modes_whose_memory_depends_on_the_text_are_not_guessed() -> None:
    for mode, optimizer in product(["moe", "per_sequence"], ["adamw_torch", "adafactor"]):
        memory = memory_of(make_model("meta", mixing=mode), Layout(), make_args(optim=optimizer))
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


def test_the_vocabulary_is_that_of_the_run(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["some words and some more"], vocab_size=280)
    tokenizer.save_pretrained(tmp_path)
    assert find_vocab_size(CorpusArguments()) == 4096
    assert find_vocab_size(CorpusArguments(vocab_size=300, tokenizer="gpt2")) == 300  # nothing is loaded
    assert find_vocab_size(CorpusArguments(tokenizer=str(tmp_path))) == len(tokenizer)
    plain = plain_tokenizer()  # training adds a token for padding, and one for masking
    plain.save_pretrained(tmp_path / "plain")
    sizes = [find_vocab_size(CorpusArguments(tokenizer=str(tmp_path / "plain")), masked) for masked in (False, True)]
    assert sizes == [len(plain) + 1, len(plain) + 2]
    for size in (0, -5):
        with pytest.raises(ValueError, match=rf"`vocab_size={size}` must be at least 1"):
            find_vocab_size(CorpusArguments(vocab_size=size))


@pytest.mark.parametrize("name", ["per_device_train_batch_size", "gradient_accumulation_steps"])
def test_a_step_without_rows_is_refused(name: str) -> None:
    arguments = make_args()
    setattr(arguments, name, 0)
    with pytest.raises(ValueError, match=f"`{name}=0` must be at least 1"):
        estimate_run(ModelArguments(**SIZES), CorpusArguments(), EstimateArguments(tflops=1.0), arguments)


@has_expert_plan
def test_sizes_of_a_run_are_its_devices() -> None:
    arguments = (ModelArguments(**SIZES, num_experts=32), CorpusArguments(block_length=NUM_COLUMNS, vocab_size=512))
    method = MethodArguments(tp_size=2, fsdp_size=4, ep_size=8)
    rows = {
        row["quantity"]: row["value"]
        for row in estimate_run(*arguments, EstimateArguments(tflops=2.0), make_args(), method)
    }
    # Two devices share a batch and its work.
    assert rows["tokens of a step"] == 4 * NUM_ROWS * NUM_COLUMNS
    flops = rows["forward pass in mode cross_example"]
    assert rows["products of a step, at least"] == pytest.approx(3 * flops * NUM_ROWS * NUM_COLUMNS / 2 / 2e6)
    assert rows["sent by a device in a step"] > 0


@pytest.mark.parametrize(
    ("devices", "method", "model", "message"),
    [
        ({"devices": 0}, {}, {}, "`devices=0` must be at least 1"),
        ({"tflops": -1.0}, {}, {}, "`tflops=-1.0` must be greater than 0"),
        ({"devices": 3, "sharding": "ep"}, {}, {}, "`num_experts=32` is not a multiple of `devices=3`"),
        ({}, {}, {"model_name_or_path": "runs/clm"}, "estimate a new model"),
        ({"devices": 4}, {"fsdp_size": 8}, {}, r"`devices=4` does not fit `fsdp_size=8`: tp_size \* fsdp_size = 8 is"),
        ({"sharding": "ep"}, {"ep_size": 2, "fsdp_size": 2}, {}, "leave out `sharding='ep'`"),
        ({}, {"ep_size": 2, "tp_size": 4}, {}, r"`ep_size=2` must be a multiple of tp_size \(4\)"),
        ({}, {"ep_size": 8, "fsdp_size": 4}, {}, r"and divide tp_size \* fsdp_size \(4\)"),
        ({}, {"ep_size": 64, "fsdp_size": 64}, {}, r"`ep_size=64` must divide `num_experts` \(32\)"),
        ({}, {"tp_size": 8}, {}, r"`tp_size=8` must divide `num_key_value_heads` \(4\)"),
        ({}, {"tp_size": 0}, {}, "`tp_size=0` must be at least 1"),
        ({}, {"lora_rank": 8}, {}, "`lora_rank=8` trains adapters, which is not estimated"),
        ({"tflops": float("nan")}, {}, {}, "`tflops=nan` must be greater than 0 and finite"),
    ],
)
def test_what_does_not_fit_is_refused(
    devices: dict[str, Any], method: dict[str, int], model: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        estimate_run(
            ModelArguments(**SIZES, num_experts=32, **model),
            CorpusArguments(),
            EstimateArguments(**devices),
            make_args(),
            MethodArguments(**method),
        )
