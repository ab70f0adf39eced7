"""What is said about batches that do not fill the groups of a model."""

import gc
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback, TrainingArguments

from mot_hf import MoTForCausalLM
from mot_hf.training import GroupSizeCheck, group_check
from mot_hf.training.group_check import FirstBatch, explain_rows, explain_short_groups, explain_trl
from tests.models import random_ids, tiny_config
from tests.training.trainers import make_trainer


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
    assert "6 rows, which is not a multiple of group_size=4" in message
    assert "one of its 2 groups has 2 of 4 rows" in message
    assert "25% of the experts' work is wasted" in message
    assert "per_device_train_batch_size to 4 or 8 " in message


def test_a_batch_below_a_group_is_given_the_group() -> None:
    (message,) = explain_short_groups(tiny_config(), 1)
    assert "one of its 1 groups has 1 of 4 rows" in message
    assert "75%" in message
    assert "per_device_train_batch_size to 4 " in message
    assert "To fine-tune in smaller batches, set mixing='per_sequence' (--mixing per_sequence)" in message


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
        assert message.endswith("each micro-batch is mixed separately.")

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
        assert "answers with inference_mixing='per_sequence', which it is not trained for" in message

    def test_a_model_that_answers_by_token_choice_and_learns_otherwise(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        config = {"mixing": "per_sequence", "inference_mixing": "moe"}
        (message,) = messages_of_run(tmp_path, caplog, config=config)
        assert "Call model.set_mixing(inference_mixing='per_sequence')" in message

    @pytest.mark.parametrize("config", [{"mixing": "moe"}, {"mlp_layer_types": ["dense"] * 4}])
    def test_where_nothing_is_mixed_nothing_is_said(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, config: dict[str, Any]
    ) -> None:
        assert messages_of_run(tmp_path, caplog, config=config, per_device_train_batch_size=3) == []


class TestRows:
    @pytest.mark.parametrize(
        "batch",
        [
            FirstBatch("cross_example"),  # nothing was seen
            FirstBatch("cross_example", num_rows=8, num_examples=8),
            FirstBatch("cross_example", num_rows=4, num_examples=8),  # DataParallel
            FirstBatch("cross_example", num_rows=8, num_examples=8, num_repeated=2),  # a data set with duplicates
            FirstBatch("per_sequence", num_rows=8, num_examples=4, answer_modes={"per_sequence"}),
            FirstBatch("moe", num_rows=8, num_examples=8, num_repeated=8, answer_modes={"moe"}),
        ],
    )
    def test_no_word(self, batch: FirstBatch) -> None:
        assert explain_rows(batch) == []

    @pytest.mark.parametrize(
        "batch",
        [
            FirstBatch("cross_example", num_rows=8, num_examples=4),
            FirstBatch("cross_example", num_rows=9, num_examples=3, answer_modes={"per_sequence"}),
            FirstBatch("per_sequence", num_rows=8, num_examples=4, answer_modes={"cross_example"}),
            FirstBatch("cross_example", num_rows=8, num_examples=8, num_repeated=4),
            FirstBatch("cross_example", num_rows=8, num_examples=8, answer_modes={"per_sequence"}),
            FirstBatch("per_sequence", num_rows=8, num_examples=8, answer_modes={"moe"}),
        ],
    )
    def test_advice(self, batch: FirstBatch) -> None:
        (message,) = explain_rows(batch)
        assert "Call model.set_mixing('per_sequence'), or set both mixing and inference_mixing to 'moe'." in message


class TestTwoGpus:
    """DataParallel deals one batch of the data loader out to the GPUs of a process."""

    def messages(
        self, folder: Path, caplog: pytest.LogCaptureFixture, num_rows: int, *, group_size: int, num_seen: int = 0
    ) -> list[str]:
        """What is said of batches of `num_rows`, of which a GPU's copy of the model was seen to run `num_seen`."""
        model = MoTForCausalLM(tiny_config(group_size=group_size)).train()
        trainer = make_trainer(model, folder, per_device_train_batch_size=num_rows)
        trainer.args._n_gpu = 2
        loader, check = trainer.get_train_dataloader(), GroupSizeCheck()
        run = (trainer.args, trainer.state, trainer.control)
        with caplog.at_level(logging.WARNING, logger="mot_hf"):
            check.on_train_begin(*run, model=model, train_dataloader=loader)
            batch = next(iter(loader))
            if num_seen:
                check.on_step_begin(*run)
                model(batch["input_ids"][:1].expand(num_seen, -1))
            check.on_step_end(*run, train_dataloader=loader)
        return [record.getMessage() for record in caplog.records if record.name.endswith("group_check")]

    def test_full_groups(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        assert self.messages(tmp_path, caplog, 16, group_size=8) == []
        assert self.messages(tmp_path, caplog, 16, group_size=8, num_seen=8) == []

    @pytest.mark.parametrize(("num_rows", "group_size"), [(16, 16), (32, 32), (8, 8)])
    def test_a_group_that_the_batch_fills_and_its_half_does_not(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, num_rows: int, group_size: int
    ) -> None:
        (message,) = self.messages(tmp_path, caplog, num_rows, group_size=group_size)
        assert f"batch of one device has {num_rows // 2} rows" in message

    def test_rows_that_are_stacked(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        (message,) = self.messages(tmp_path, caplog, 8, group_size=4, num_seen=8)
        assert "A forward pass has 8 rows for 4 examples" in message

    def test_a_last_batch_is_divided_too(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        # Of 64 rows, the second batch has 24: 12 for each.
        (message,) = self.messages(tmp_path, caplog, 40, group_size=5)
        assert "last batch of every epoch has 12 rows" in message


def test_batches_that_are_split_over_processes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = MoTForCausalLM(tiny_config()).train()
    trainer = make_trainer(model, tmp_path, per_device_train_batch_size=12)
    plain, check = trainer.get_train_dataloader().base_dataloader, GroupSizeCheck()
    loader = prepare_data_loader(plain, num_processes=2, process_index=0, split_batches=True, put_on_device=False)
    run = (trainer.args, trainer.state, trainer.control)
    with caplog.at_level(logging.WARNING, logger="mot_hf"):
        check.on_train_begin(*run, model=model, train_dataloader=loader)
        check.on_step_begin(*run)
        batch = next(iter(loader))
        assert len(batch["input_ids"]) == 6
        model(batch["input_ids"])
        check.on_step_end(*run, train_dataloader=loader)
    message = next(record.getMessage() for record in caplog.records if record.name.endswith("group_check"))
    assert "batch of one device has 6 rows" in message


@dataclass
class SFTConfig(TrainingArguments):
    """Arguments like TRL's: the coefficient of the load-balancing loss, `None` for that of the model."""

    router_aux_loss_coef: float | None = None


class TestTrl:
    @pytest.mark.parametrize("mode", ["cross_example", "per_sequence"])
    def test_what_its_defaults_add_to_the_loss(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: str
    ) -> None:
        # The configuration of a model, as TRL's SFTTrainer leaves it.
        config = tiny_config(mixing=mode, output_router_logits=True, router_aux_loss_coef=0.02)
        args = SFTConfig(str(tmp_path), report_to="none")
        (message,) = explain_trl(config, args)
        assert message.startswith("TRL adds 0.02 times the load-balancing loss")
        assert f"mixing='{mode}'" in message
        assert message.endswith("Set router_aux_loss_coef=0.0 in the SFTConfig.")
        trainer = make_trainer(MoTForCausalLM(config), tmp_path)
        with caplog.at_level(logging.WARNING, logger="mot_hf"):
            GroupSizeCheck().on_train_begin(
                args, trainer.state, trainer.control, model=trainer.model, train_dataloader=None
            )
        assert [record.getMessage() for record in caplog.records if record.name.endswith("group_check")] == [message]

    @pytest.mark.parametrize(("own", "added"), [(None, 0.02), (0.5, 0.5)])
    def test_what_is_added_where_the_configuration_does_not_tell(
        self, tmp_path: Path, own: float | None, added: float
    ) -> None:
        # The configuration of a model, as TRL's DPOTrainer and GRPOTrainer leave it.
        config = tiny_config(mixing="per_sequence", router_aux_loss_coef=0.02)
        (message,) = explain_trl(config, SFTConfig(str(tmp_path), router_aux_loss_coef=own))
        assert message.startswith(f"TRL adds {added} times the load-balancing loss")
        assert explain_trl(config, SFTConfig(str(tmp_path), router_aux_loss_coef=0.0)) == []

    def test_nothing_is_added_as_advised(self, tmp_path: Path) -> None:
        config = tiny_config(output_router_logits=False, router_aux_loss_coef=0.0)
        assert explain_trl(config, SFTConfig(str(tmp_path), router_aux_loss_coef=0.0)) == []

    def test_token_choice_is_to_be_balanced(self, tmp_path: Path) -> None:
        config = tiny_config(mixing="moe", inference_mixing="moe", output_router_logits=True)
        assert explain_trl(config, SFTConfig(str(tmp_path))) == []

    def test_other_trainers_add_nothing(self, tmp_path: Path) -> None:
        assert explain_trl(tiny_config(output_router_logits=True), TrainingArguments(str(tmp_path))) == []


class Stacking(Trainer):
    """Runs the model on the rows of a batch and on as many others, and a reference without learning."""

    reference: MoTForCausalLM | None = None

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], **kwargs: Any) -> torch.Tensor:
        if self.reference is not None:
            with torch.no_grad():
                self.reference.eval()(**inputs)
            return model(**inputs).loss
        return model(**{name: torch.cat([value, value.flip(1)]) for name, value in inputs.items()}).loss


def run_stacking(folder: Path, caplog: pytest.LogCaptureFixture, **arguments: Any) -> list[str]:
    model = MoTForCausalLM(tiny_config())
    reference = MoTForCausalLM(tiny_config()) if arguments.pop("has_reference", False) else None
    stock = make_trainer(model, folder, max_steps=2, **arguments)
    trainer = Stacking(model, stock.args, stock.data_collator, stock.train_dataset, callbacks=[GroupSizeCheck()])
    trainer.reference = reference
    trainer.eval_dataset = stock.eval_dataset
    with caplog.at_level(logging.WARNING, logger="mot_hf"):
        trainer.train()
    return [record.getMessage() for record in caplog.records if record.name.endswith("group_check")]


class TestOthersTrainers:
    @pytest.mark.parametrize("arguments", [{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}])
    def test_rows_that_a_trainer_stacks(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, arguments: dict[str, Any]
    ) -> None:
        (message,) = run_stacking(tmp_path, caplog, per_device_train_batch_size=3, **arguments)
        assert "A forward pass has 6 rows for 3 examples" in message

    def test_a_reference(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        (message,) = run_stacking(tmp_path, caplog, has_reference=True)
        assert (
            "answers within a training step, its own or those of a reference model, use mode 'per_sequence'" in message
        )

    def test_rows_that_are_repeated_are_noticed_in_a_worker_too(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        stock = make_trainer(MoTForCausalLM(tiny_config()), tmp_path, max_steps=1, dataloader_num_workers=1)
        stock.train_dataset = cast(Dataset, stock.train_dataset).select([row // 4 for row in range(64)])
        stock.add_callback(GroupSizeCheck())
        with caplog.at_level(logging.WARNING, logger="mot_hf"):
            stock.train()
        (message,) = [record.getMessage() for record in caplog.records if record.name.endswith("group_check")]
        assert message.startswith("Examples occur more than once in a batch")

    def test_an_evaluation_is_no_answer_within_a_step(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        messages = messages_of_run(tmp_path, caplog, eval_on_start=True, eval_strategy="steps", eval_steps=1)
        assert not [message for message in messages if "within a training step" in message]


@pytest.mark.slow
@pytest.mark.parametrize("by", ["arguments", "launcher"])
def test_the_rows_of_a_compiled_model_are_those_of_the_batch(
    by: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a compiled model warns of hooks of all modules")

    monkeypatch.setattr(group_check, "register_module_forward_hook", refuse)
    config = {"num_hidden_layers": 1}  # compiling takes time for each layer
    if by == "launcher":
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
        arguments: dict[str, Any] = {"config": config}
    else:
        arguments = {"torch_compile": True, "torch_compile_backend": "eager", "config": config}
    (message,) = messages_of_run(tmp_path, caplog, per_device_train_batch_size=6, **arguments)
    assert "batch of one device has 6 rows" in message


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    trainer = make_trainer(MoTForCausalLM(tiny_config()), tmp_path, [GroupSizeCheck()], max_steps=2)
    loader = trainer.get_train_dataloader()
    trainer.get_train_dataloader = lambda: loader
    trainer.train()
    assert loader.base_dataloader.collate_fn is trainer.data_collator
    assert not torch.nn.modules.module._global_forward_hooks


def test_a_run_that_failed_leaves_nothing_for_the_next(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = MoTForCausalLM(tiny_config())
    fails = iter([True])

    def fail_once(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if next(fails, False):
            raise RuntimeError("the first pass fails")

    model.register_forward_pre_hook(fail_once, with_kwargs=True)
    trainer = make_trainer(model, tmp_path, [GroupSizeCheck()], max_steps=1, per_device_train_batch_size=6)
    with pytest.raises(RuntimeError, match="the first pass fails"):
        trainer.train()
    with caplog.at_level(logging.WARNING, logger="mot_hf"):
        trainer.train()
    assert len([record for record in caplog.records if record.name.endswith("group_check")]) == 1
    assert not torch.nn.modules.module._global_forward_hooks


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


def test_a_run_that_fails_leaves_no_hook(tmp_path: Path) -> None:
    class Failure(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    gc.collect()
    hooks = dict(torch.nn.modules.module._global_forward_hooks)
    trainer = make_trainer(MoTForCausalLM(tiny_config()), tmp_path, [GroupSizeCheck(), Failure()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert torch.nn.modules.module._global_forward_hooks.keys() > hooks.keys()
    del trainer
    gc.collect()
    assert torch.nn.modules.module._global_forward_hooks == hooks
