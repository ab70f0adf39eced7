"""What is said about batches that do not fill the groups of a model."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from mot_hf import MoTForCausalLM
from mot_hf.training import GroupSizeCheck
from mot_hf.training.group_check import explain_short_groups
from tests.models import random_ids, tiny_config
from tests.toolkit.training import make_trainer


def messages_of_run(folder: Path, caplog: pytest.LogCaptureFixture, **arguments: Any) -> list[str]:
    model = MoTForCausalLM(tiny_config(**arguments.pop("config", {})))
    trainer = make_trainer(model, folder, [GroupSizeCheck()], max_steps=1, **arguments)
    with caplog.at_level(logging.WARNING, logger="mot_hf"):
        trainer.train()
    return [record.getMessage() for record in caplog.records if record.name.startswith("mot_hf")]


@pytest.mark.parametrize("num_rows", [4, 8, 400])
def test_full_groups_need_no_word(num_rows: int) -> None:
    assert explain_short_groups(tiny_config(), num_rows) == []


def test_a_batch_between_two_multiples_is_given_both() -> None:
    (message,) = explain_short_groups(tiny_config(), 6)
    assert "6 rows, which is no multiple of group_size=4" in message
    assert "one of its 2 groups has 2 of 4 rows" in message
    assert "25% of the experts' work is wasted" in message
    assert "per_device_train_batch_size to 4 or 8 " in message


def test_a_batch_below_a_group_is_given_the_group() -> None:
    (message,) = explain_short_groups(tiny_config(), 1)
    assert "one of its 1 groups has 1 of 4 rows" in message
    assert "75%" in message
    assert "per_device_train_batch_size to 4 " in message


def test_the_last_batch_is_named_apart() -> None:
    (message,) = explain_short_groups(tiny_config(), 8, 5)
    assert "last batch of every epoch has 5 rows" in message
    assert "dataloader_drop_last=True" in message


class TestRuns:
    def test_full_groups(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        assert messages_of_run(tmp_path, caplog) == []

    def test_batch_size(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        (message,) = messages_of_run(tmp_path, caplog, per_device_train_batch_size=10)
        assert "batch of one device has 10 rows" in message

    def test_last_batch(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        config = {"group_size": 5}
        (message,) = messages_of_run(tmp_path, caplog, config=config, per_device_train_batch_size=10)
        assert "last batch of every epoch has 4 rows" in message

    def test_a_last_batch_that_is_dropped(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        arguments = {"config": {"group_size": 5}, "per_device_train_batch_size": 10, "dataloader_drop_last": True}
        assert messages_of_run(tmp_path, caplog, **arguments) == []

    def test_accumulation_does_not_help(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        (message,) = messages_of_run(tmp_path, caplog, per_device_train_batch_size=2, gradient_accumulation_steps=2)
        assert "has 2 rows" in message
        assert message.endswith("every micro-batch is mixed by itself.")

    def test_the_batch_that_auto_find_batch_size_found(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        model = MoTForCausalLM(tiny_config())

        def run_out_of_memory(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if len(kwargs["input_ids"]) > 7:
                raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")

        model.register_forward_pre_hook(run_out_of_memory, with_kwargs=True)
        trainer = make_trainer(model, tmp_path, [GroupSizeCheck()], max_steps=1, auto_find_batch_size=True)
        with caplog.at_level(logging.WARNING, logger="mot_hf"):
            trainer.train()
        messages = [record.getMessage() for record in caplog.records if record.name.startswith("mot_hf")]
        assert "batch of one device has 7 rows" in messages[0]

    def test_router_logits_are_none_of_its_business(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        # Transformers' Trainer makes no loss of them in this mode, TRL's trainers do.
        assert messages_of_run(tmp_path, caplog, config={"output_router_logits": True}) == []

    def test_one_process_speaks_for_all(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        trainer = make_trainer(
            MoTForCausalLM(tiny_config()), tmp_path, [GroupSizeCheck()], per_device_train_batch_size=3
        )
        trainer.is_world_process_zero = lambda: False
        with caplog.at_level(logging.WARNING, logger="mot_hf"):
            trainer.train()
        assert not [record for record in caplog.records if record.name.startswith("mot_hf")]

    def test_a_model_that_learns_token_choice_and_answers_otherwise(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        config = {"mixing": "moe", "inference_mixing": "per_sequence"}
        (message,) = messages_of_run(tmp_path, caplog, config=config)
        assert "answers in inference_mixing='per_sequence', which it does not learn" in message

    @pytest.mark.parametrize("config", [{"mixing": "moe"}, {"mlp_layer_types": ["dense"] * 4}])
    def test_where_nothing_is_mixed_nothing_is_said(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, config: dict[str, Any]
    ) -> None:
        assert messages_of_run(tmp_path, caplog, config=config, per_device_train_batch_size=3) == []


def test_rows_grouped_by_length_are_mixed_without_their_padding(tmp_path: Path) -> None:
    lengths = [3, 12, 5, 12, 3, 5, 12, 3] * 16
    rows = [ids[:length] for ids, length in zip(random_ids(128, 12).tolist(), lengths, strict=True)]
    model = MoTForCausalLM(tiny_config())
    shares = []

    def count_padding(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        shares.append(kwargs["attention_mask"].float().mean())

    model.register_forward_pre_hook(count_padding, with_kwargs=True)
    trainer = make_trainer(model, tmp_path, max_steps=16, train_sampling_strategy="group_by_length")
    trainer.train_dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})
    trainer.data_collator = pad
    trainer.train()
    assert len(shares) == 16
    assert torch.stack(shares).mean() > 0.8  # 0.54 without grouping
    assert all(torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]).isfinite())


def pad(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row["input_ids"]) for row in rows], batch_first=True, padding_value=0
    )
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids.masked_fill(ids == 0, -100)}


def test_flattened_rows_are_refused_with_the_reason(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"input_ids": random_ids(16, 12).tolist()})
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", per_device_train_batch_size=4)
    model = MoTForCausalLM(tiny_config())
    trainer = Trainer(model, arguments, DataCollatorWithFlattening(), rows)
    with pytest.raises(ValueError, match="one row that holds several sequences"):
        trainer.train()
    model.set_mixing("per_sequence")
    assert trainer.train().global_step == 1
