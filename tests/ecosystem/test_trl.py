"""TRL's trainers on MoT models: what each way of laying out a batch does to the mixing."""

import copy
import dataclasses
import importlib
import logging
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Trainer

from mot_hf import MoTForCausalLM, MoTForSequenceClassification, MoTPreTrainedModel
from mot_hf.data.tokenizer import train_tokenizer
from mot_hf.training import GroupSizeCheck
from tests.models import companions_of, tiny_config, trained
from tests.training.trainers import losses_of

trl = pytest.importorskip("trl")

WORDS = ["the", "a", "group", "of", "tokens", "rows", "columns", "experts", "mixes", "every", "batch"]
TEXTS = [" ".join(WORDS[(row * word + word * word) % 11] for word in range(4 + row % 9)) for row in range(64)]
CHATS = [
    [{"role": "user", "content": text}, {"role": "assistant", "content": f"{text} and {text[:9]}"}] for text in TEXTS
]
PAIRS = [
    {"prompt": text, "chosen": f" good {text[: row % 7]}", "rejected": f" bad {text[: row % 5]}"}
    for row, text in enumerate(TEXTS)
]
CHAT_TEMPLATE = """
{%- for message in messages %}{{ message['role'] }}: {{ message['content'] }}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""

FLATTENED: dict[str, dict[str, Any]] = {
    "bfd": {"packing": True, "max_length": 32},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 32},
    "padding_free": {"padding_free": True, "max_length": None},
}
NUM_STEPS = 8


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer([*TEXTS, "user: assistant: good bad"], vocab_size=300)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast, **config: Any) -> MoTForCausalLM:
    torch.manual_seed(0)
    return MoTForCausalLM(tiny_config(vocab_size=len(tokenizer), max_position_embeddings=256, **config))


def settings(folder: Path, **arguments: Any) -> dict[str, Any]:
    defaults = {
        "output_dir": str(folder),
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "router_aux_loss_coef": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }
    return defaults | arguments


def only_known(kind: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that a class of arguments has: TRL's differ."""
    known = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in arguments.items() if name in known}


def make_sft(
    model: MoTForCausalLM | str, folder: Path, tokenizer: PreTrainedTokenizerFast, data: dict, **arguments: Any
) -> Any:
    args = trl.SFTConfig(**settings(folder, **arguments))
    return trl.SFTTrainer(model, args, train_dataset=Dataset.from_dict(data), processing_class=tokenizer)


def record_batches(model: nn.Module) -> list[dict[str, Tensor]]:
    """What a model is given, a dictionary for every forward pass from now on."""
    batches: list[dict[str, Tensor]] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: batches.append(dict(kwargs)), with_kwargs=True)
    return batches


def counts_of(model: MoTForCausalLM) -> set[int]:
    """Number of batches that the statistics were gathered from."""
    return {int(value) for name, value in companions_of(model).items() if name.endswith("num_batches_tracked")}


def warnings_of(trainer: Trainer, caplog: pytest.LogCaptureFixture) -> list[str]:
    trainer.add_callback(GroupSizeCheck())
    with caplog.at_level(logging.WARNING, logger="mot_hf"):
        trainer.train()
    return [record.getMessage() for record in caplog.records if record.name == "mot_hf.training.group_check"]


class TestSupervised:
    def test_chats_of_several_rows_are_mixed(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
    ) -> None:
        original = make_model(tokenizer)
        original.save_pretrained(tmp_path / "base")
        trainer = make_sft(str(tmp_path / "base"), tmp_path, tokenizer, {"messages": CHATS})
        assert type(trainer.model) is MoTForCausalLM
        batches = record_batches(trainer.model)
        assert warnings_of(trainer, caplog) == []
        losses = losses_of(trainer)
        assert losses[-1] < losses[0] - 1
        assert counts_of(trainer.model) == {NUM_STEPS}
        assert len(batches[0]["input_ids"]) == 8
        first = {name: batches[0][name] for name in ("input_ids", "attention_mask", "labels")}
        assert not first["attention_mask"].all()
        with torch.no_grad():
            expected = {mode: original.train()(**first, mixing=mode).loss.item() for mode in ("cross_example", "moe")}
        assert losses[0] == pytest.approx(expected["cross_example"], abs=1e-4)
        assert abs(losses[0] - expected["moe"]) > 1e-3

    def test_wrapped_packing_gives_full_rows(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = make_model(tokenizer)
        packing = {"packing": True, "packing_strategy": "wrapped", "max_length": 32}
        trainer = make_sft(model, tmp_path, tokenizer, {"text": TEXTS}, **packing, dataloader_drop_last=True)
        batches = record_batches(model)
        assert warnings_of(trainer, caplog) == []
        assert {batch["input_ids"].shape for batch in batches} == {(8, 32)}
        assert losses_of(trainer)[-1] < losses_of(trainer)[0] - 1
        assert counts_of(model) == {NUM_STEPS}

    @pytest.mark.parametrize("layout", FLATTENED)
    def test_flattened_batches_are_refused_with_the_reason(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, layout: str
    ) -> None:
        model = make_model(tokenizer)
        trainer = make_sft(model, tmp_path, tokenizer, {"text": TEXTS}, **FLATTENED[layout], max_steps=2)
        batches = record_batches(model)
        with pytest.raises(ValueError, match=r"one row that holds several sequences .* set mixing='per_sequence'"):
            trainer.train()
        assert len(batches) == 1
        assert len(batches[0]["input_ids"]) == 1
        model.set_mixing("per_sequence")
        assert trainer.train().global_step == 2

    @pytest.mark.parametrize("mode", ["per_sequence", "moe"])
    def test_flattening_changes_nothing_in_the_other_modes(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, mode: str
    ) -> None:
        losses = []
        for layout in ({}, FLATTENED["padding_free"]):
            model = trained(make_model(tokenizer)).set_mixing(mode)
            trainer = make_sft(model, tmp_path, tokenizer, {"text": TEXTS}, **layout)
            batches = record_batches(model)
            trainer.train()
            assert len(batches[0]["input_ids"]) == (1 if layout else 8)
            losses.append(losses_of(trainer))
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)
        assert losses[0][-1] < losses[0][0] - 1

    @pytest.mark.parametrize("mode", ["cross_example", "per_sequence", "moe"])
    def test_the_load_balancing_loss_of_the_defaults_is_pointed_out(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture, mode: str
    ) -> None:
        inference_mixing = "moe" if mode == "moe" else "per_sequence"
        model = trained(make_model(tokenizer)).set_mixing(mode, inference_mixing=inference_mixing)
        trainer = make_sft(model, tmp_path, tokenizer, {"text": TEXTS}, router_aux_loss_coef=None, max_steps=1)
        messages = warnings_of(trainer, caplog)
        assert trainer.state.log_history[0]["aux_loss"] > 0
        if mode == "moe":
            assert messages == []
        else:
            (message,) = messages
            assert f"mixing='{mode}' does not need it. Set router_aux_loss_coef=0.0 in the SFTConfig." in message


def make_dpo(model: MoTForCausalLM, folder: Path, tokenizer: PreTrainedTokenizerFast, **arguments: Any) -> Any:
    args = trl.DPOConfig(**settings(folder, **arguments))
    reference = copy.deepcopy(model)
    return trl.DPOTrainer(model, reference, args, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer)


class TestPreferences:
    @pytest.mark.parametrize("mode", ["per_sequence", "moe"])
    def test_a_model_starts_as_its_reference(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture, mode: str
    ) -> None:
        model = trained(make_model(tokenizer)).set_mixing(mode, inference_mixing=mode)
        trainer = make_dpo(model, tmp_path, tokenizer, per_device_train_batch_size=4)
        before = companions_of(model)
        assert warnings_of(trainer, caplog) == []
        losses = losses_of(trainer)
        assert losses[0] == pytest.approx(log(2), abs=1e-5)
        assert losses[-1] < 0.4
        assert all(torch.equal(value, before[name]) for name, value in companions_of(model).items())

    def test_the_load_balancing_loss_of_the_defaults_is_pointed_out(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = trained(make_model(tokenizer)).set_mixing("per_sequence", inference_mixing="per_sequence")
        trainer = make_dpo(model, tmp_path, tokenizer, router_aux_loss_coef=None, max_steps=1)
        (message,) = warnings_of(trainer, caplog)
        assert losses_of(trainer)[0] == pytest.approx(log(2) + 0.01 * trainer.state.log_history[0]["aux_loss"])
        assert message.startswith("TRL adds 0.01 times the load-balancing loss")
        assert message.endswith("Set router_aux_loss_coef=0.0 in the DPOConfig.")

    def test_mode_cross_example_is_not_where_a_model_starts(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        trainer = make_dpo(trained(make_model(tokenizer)), tmp_path, tokenizer, max_steps=1)
        trainer.train()
        assert abs(losses_of(trainer)[0] - log(2)) > 1e-3

    def test_a_reference_in_another_mode_is_pointed_out(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = trained(make_model(tokenizer)).set_mixing("per_sequence", inference_mixing="moe")
        trainer = make_dpo(model, tmp_path, tokenizer, per_device_train_batch_size=4, max_steps=1)
        of_model, message = warnings_of(trainer, caplog)
        assert "answers with inference_mixing='moe', which it is not trained for" in of_model
        assert "is trained with mixing='per_sequence', but the answers within a training step" in message
        assert "use mode 'moe'" in message


def unpair(pairs: list[dict[str, str]]) -> list[dict[str, Any]]:
    return [
        {"prompt": pair["prompt"], "completion": pair[kind], "label": kind == "chosen"}
        for pair in pairs
        for kind in ("chosen", "rejected")
    ]


def reward_length(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def make_any(
    name: str, model: MoTPreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerFast, **arguments: Any
) -> Any:
    """A trainer of TRL by its name, on data that it understands."""
    module = trl if hasattr(trl, f"{name}Trainer") else importlib.import_module(f"trl.experimental.{name.lower()}")
    kind = getattr(module, f"{name}Config")
    lengths = {"max_completion_length": 8, "num_generations": 4}
    args = kind(
        **only_known(kind, settings(folder, max_steps=1, per_device_train_batch_size=4, **lengths) | arguments)
    )
    data = [pair | {"reference": " fine"} for pair in PAIRS] if name == "TPO" else PAIRS
    named = {"train_dataset": Dataset.from_list(unpair(PAIRS) if name == "KTO" else data)}
    if name == "GRPO":
        named |= {"reward_funcs": reward_length, "train_dataset": Dataset.from_list([{"prompt": t} for t in TEXTS])}
    if name in ("DPO", "KTO"):
        named["ref_model"] = copy.deepcopy(model)
    return getattr(module, f"{name}Trainer")(model, args=args, processing_class=tokenizer, **named)


class TestRowsThatBelongTogether:
    @pytest.mark.parametrize(("name", "num_rows"), [("DPO", 8), ("ORPO", 8), ("CPO", 8), ("TPO", 12)])
    def test_answers_that_are_stacked(
        self,
        tmp_path: Path,
        tokenizer: PreTrainedTokenizerFast,
        caplog: pytest.LogCaptureFixture,
        name: str,
        num_rows: int,
    ) -> None:
        model = trained(make_model(tokenizer))
        trainer = make_any(name, model, tmp_path, tokenizer)
        batches = record_batches(model.model)
        (message,) = warnings_of(trainer, caplog)
        assert len(batches[0]["input_ids"]) == num_rows
        assert f"has {num_rows} rows for 4 examples" in message
        assert "mixes the answers to the same prompt with each other. Call model.set_mixing('per_sequence')" in message

    @pytest.mark.parametrize("num_pairs", [2, 3])
    def test_a_reward_model(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture, num_pairs: int
    ) -> None:
        model = MoTForSequenceClassification(tiny_config(vocab_size=len(tokenizer), num_labels=1))
        size = {"per_device_train_batch_size": num_pairs}
        (message,) = warnings_of(make_any("Reward", model, tmp_path, tokenizer, **size), caplog)
        assert f"has {2 * num_pairs} rows for {num_pairs} examples" in message
        assert "Call model.set_mixing('per_sequence')" in message
        # As advised.
        caplog.clear()
        model.set_mixing("per_sequence")
        assert warnings_of(make_any("Reward", model, tmp_path, tokenizer, **size), caplog) == []

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_several_answers_to_a_prompt_are_generated(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture, num_workers: int
    ) -> None:
        arguments = {"dataloader_num_workers": num_workers}
        trainer = make_any("GRPO", trained(make_model(tokenizer)), tmp_path, tokenizer, **arguments)
        (message,) = warnings_of(trainer, caplog)
        assert "Examples occur more than once in a batch" in message
        assert "Call model.set_mixing('per_sequence')" in message
        caplog.clear()
        model = trained(make_model(tokenizer)).set_mixing("per_sequence")
        assert warnings_of(make_any("GRPO", model, tmp_path, tokenizer, **arguments), caplog) == []

    def test_a_reference_of_single_answers(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
    ) -> None:
        trainer = make_any("KTO", trained(make_model(tokenizer)), tmp_path, tokenizer)
        (message,) = warnings_of(trainer, caplog)
        assert "but the answers within a training step, its own or those of a reference model, use mode" in message
        assert "Call model.set_mixing('per_sequence')" in message
        caplog.clear()
        model = trained(make_model(tokenizer)).set_mixing("per_sequence")
        assert warnings_of(make_any("KTO", model, tmp_path, tokenizer), caplog) == []

    @pytest.mark.parametrize("prefix", ["", "You are a group of tokens. " * 4])
    def test_rows_that_begin_alike_may_be_mixed(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture, prefix: str
    ) -> None:
        data = {"text": [prefix + text for text in TEXTS]}
        assert warnings_of(make_sft(make_model(tokenizer), tmp_path, tokenizer, data, max_steps=1), caplog) == []
