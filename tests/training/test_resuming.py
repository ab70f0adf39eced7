"""A resumed run is that of its checkpoint: tokenizer and settings are the checkpoint's, or refused by name."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerState, TrainingArguments

from mot_hf import MoTConfig, MoTForCausalLM, MoTForMaskedLM
from mot_hf.data.tokenizer import train_tokenizer
from mot_hf.training import MethodArguments, add_callbacks, finetune_classification
from mot_hf.training.resuming import CheckpointDescription, check_arguments, check_settings, load_checkpoint_tokenizer
from tests.models import tiny_config
from tests.training.language_runs import SMALL, TEXTS, plain_tokenizer, save_base, train, write_text
from tests.training.trainers import make_trainer, model_of, same_tensors

NEW_TEXTS = [text.replace("fox", "xyzzy").replace("dog", "plugh") for text in TEXTS]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, and a run of two steps on it with a tokenizer of 270 tokens."""
    folder = tmp_path_factory.mktemp("first")
    train(folder / "run", write_text(folder / "text"), corpus={"vocab_size": 270}, max_steps=2)
    return folder


@pytest.fixture(scope="module")
def switched(first: Path) -> Path:
    """A run of four steps on that text, the last three in mode moe, with all checkpoints."""
    train(first / "switched", str(first / "text"), method={"transition_share": 0.25}, save_steps=1)
    return first / "switched"


@pytest.fixture
def source(first: Path) -> str:
    return str(first / "text")


@pytest.fixture
def checkpoint(first: Path, tmp_path: Path) -> str:
    """The checkpoint of a copy of that run."""
    shutil.copytree(first / "run", tmp_path / "run")
    return str(tmp_path / "run" / "checkpoint-2")


class TestTokenizer:
    def test_a_changed_text_changes_no_meanings(
        self, tmp_path: Path, checkpoint: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        saved = AutoTokenizer.from_pretrained(checkpoint).get_vocab()
        assert train_tokenizer(NEW_TEXTS, 270).get_vocab() != saved
        source = write_text(tmp_path / "changed", NEW_TEXTS)
        train(tmp_path / "run", source, corpus={"vocab_size": 270}, resume_from_checkpoint="true")
        assert f"Using the tokenizer of the checkpoint {checkpoint!r} with 270 tokens." in caplog.text
        assert AutoTokenizer.from_pretrained(tmp_path / "run").get_vocab() == saved

    def test_the_same_text_gives_the_same_run(self, tmp_path: Path, source: str) -> None:
        whole = train(tmp_path / "whole", source)
        resumed = train(tmp_path / "resumed", source, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
        assert same_tensors(model_of(resumed).state_dict(), model_of(whole).state_dict())

    @pytest.mark.parametrize(
        ("vocab_size", "texts", "message"),
        [
            (270, NEW_TEXTS, r"other.*differs from the tokenizer of the checkpoint.*run.checkpoint-2"),
            (280, TEXTS, r"has 280 tokens, but the tokenizer of the checkpoint .*checkpoint-2' has 270"),
        ],
    )
    def test_another_tokenizer_is_refused(
        self, vocab_size: int, texts: list[str], message: str, tmp_path: Path, checkpoint: str
    ) -> None:
        train_tokenizer(texts, vocab_size).save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match=message):
            train(
                tmp_path / "run",
                "no text is read",
                corpus={"tokenizer": str(tmp_path / "other")},
                resume_from_checkpoint=checkpoint,
            )

    def test_a_smaller_vocab_size_is_refused(self, tmp_path: Path, checkpoint: str) -> None:
        with pytest.raises(ValueError, match=r"`vocab_size=260` is less than the 270 tokens of the checkpoint"):
            train(tmp_path / "run", "-", corpus={"vocab_size": 260}, resume_from_checkpoint=checkpoint)

    def test_a_checkpoint_without_one_takes_that_of_the_run_only_by_name(
        self, tmp_path: Path, source: str, checkpoint: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        tokens = tmp_path / "tokens"
        tokens.mkdir()
        for path in Path(checkpoint).glob("tokenizer*"):
            path.rename(tokens / path.name)
        with pytest.raises(ValueError, match=r"checkpoint-2' has no tokenizer.*set --tokenizer"):
            train(tmp_path / "run", "no text is read", resume_from_checkpoint="true")
        train(tmp_path / "run", source, corpus={"tokenizer": str(tokens)}, resume_from_checkpoint="true")
        assert "checkpoint-2' has no tokenizer to compare" in caplog.text


class TestSettings:
    @pytest.mark.parametrize(
        ("changes", "differences"),
        [
            (
                {"hidden_size": 64},
                ["hidden_size=32 in the checkpoint and 64 now", "head_dim=16 in the checkpoint and 32 now"],
            ),
            ({"num_experts": 16}, ["num_experts=8 in the checkpoint and 16 now"]),
            ({"group_size": 8}, ["group_size=4 in the checkpoint and 8 now"]),
            ({"tie_word_embeddings": True}, ["tie_word_embeddings=False in the checkpoint and True now"]),
            ({"mixing": "per_sequence"}, ["mixing='cross_example' in the checkpoint and 'per_sequence' now"]),
            ({"num_experts_per_tok": 3}, ["num_experts_per_tok=2 in the checkpoint and 3 now"]),
        ],
    )
    def test_what_differs_is_named_before_any_work(
        self, changes: dict[str, Any], differences: list[str], tmp_path: Path, checkpoint: str
    ) -> None:
        with pytest.raises(ValueError, match="was trained with other settings") as raised:
            train(tmp_path / "run", "no text is read", model=SMALL | changes, resume_from_checkpoint=checkpoint)
        assert [words for words in differences if words not in str(raised.value)] == []

    def test_so_are_the_length_of_rows_and_the_kind_of_model(self, tmp_path: Path, checkpoint: str) -> None:
        with pytest.raises(ValueError, match="max_position_embeddings=12 in the checkpoint and 24 now"):
            train(tmp_path / "run", "-", corpus={"block_length": 24}, resume_from_checkpoint=checkpoint)
        with pytest.raises(
            ValueError, match="architecture='MoTForCausalLM' in the checkpoint and 'MoTForMaskedLM' now"
        ):
            train(tmp_path / "run", "-", masked=True, resume_from_checkpoint=checkpoint)

    def test_modes_that_transition_tuning_has_changed_are_no_difference(self, tmp_path: Path, source: str) -> None:
        method = {"transition_share": 0.25}
        whole = train(tmp_path / "whole", source, method=method)
        checkpoint = str(tmp_path / "whole" / "checkpoint-2")
        assert MoTConfig.from_pretrained(checkpoint).mixing == "moe"
        resumed = train(tmp_path / "resumed", source, method=method, resume_from_checkpoint=checkpoint)
        assert same_tensors(model_of(resumed).state_dict(), model_of(whole).state_dict())
        with pytest.raises(ValueError, match="inference_mixing='moe' in the checkpoint and 'per_sequence' now"):
            train(tmp_path / "plain", source, resume_from_checkpoint=checkpoint)

    @pytest.mark.parametrize(
        ("step", "share", "steps", "message"),
        [
            (2, 0.75, 4, "share=0.75` .* wants mode cross_example at step 2 of 4, .* in mode moe there"),
            (2, 0.25, 12, "share=0.25` .* wants mode cross_example at step 2 of 12, .* in mode moe there"),
            (1, 0.0, 4, "share=0.0` .* wants mode moe at step 1 of 4, .* in mode cross_example there"),
            (1, 0.75, 4, None),
            (2, 0.1, 10, None),
        ],
    )
    def test_the_switch_cannot_move_to_the_other_side_of_the_checkpoint(
        self,
        step: int,
        share: float,
        steps: int,
        message: str | None,
        switched: Path,
        source: str,
        tmp_path: Path,
    ) -> None:
        resume = {"resume_from_checkpoint": str(switched / f"checkpoint-{step}"), "max_steps": steps}
        with pytest.raises(ValueError, match=message) if message else nullcontext():
            train(tmp_path / "run", source, method={"transition_share": share}, **resume)

    def test_adapters_are_resumed_after_the_switch(self, tmp_path: Path, source: str) -> None:
        base = {"model_name_or_path": save_base(tmp_path / "base", train_tokenizer(TEXTS, 280))}
        method = {"transition_share": 0.25, "lora_rank": 2}
        train(tmp_path / "run", source, model=base, method=method)
        resume = {"resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-2"), "max_steps": 4}
        train(tmp_path / "again", source, model=base, method=method, **resume)
        with pytest.raises(ValueError, match="wants mode cross_example at step 2 of 4"):
            train(tmp_path / "again", source, model=base, method=method | {"transition_share": 0.75}, **resume)

    def test_adapters_are_compared_too(self, tmp_path: Path, source: str) -> None:
        base = save_base(tmp_path / "base", train_tokenizer(TEXTS, 280))
        model, method = {"model_name_or_path": base}, {"lora_rank": 2}
        train(tmp_path / "lora", source, model=model, method=method, max_steps=2)
        adapters = str(tmp_path / "lora" / "checkpoint-2")
        for changed, message in (
            ({"lora_rank": 4}, "lora_rank=2 in the checkpoint and 4 now"),
            ({"lora_rank": 2, "lora_alpha": 8}, "lora_alpha=16 in the checkpoint and 8 now"),
            ({}, "lora_rank=2 in the checkpoint and 0 now"),
        ):
            with pytest.raises(ValueError, match=message):
                train(tmp_path / "lora", "-", model=model, method=changed, resume_from_checkpoint=adapters)
        with pytest.raises(ValueError, match="num_experts_per_tok=2 in the checkpoint and 1 now"):
            train(
                tmp_path / "lora",
                "no text is read",
                model=model | {"num_experts_per_tok": 1},
                method=method,
                resume_from_checkpoint=adapters,
            )
        train(tmp_path / "whole", source, model=model, max_steps=2)
        with pytest.raises(ValueError, match="lora_rank=0 in the checkpoint and 2 now"):
            train(tmp_path / "whole", "-", model=model, method=method, resume_from_checkpoint="true")
        # Still adapters, and no whole model, for whoever loads them.
        loaded = AutoModelForCausalLM.from_pretrained(adapters)
        assert any("lora" in name for name, _ in loaded.named_parameters())


class TestArguments:
    """The checkpoint of two steps was written with a learning rate of 0.01 and defaults."""

    @pytest.mark.parametrize(
        ("name", "saved", "asked"),
        [
            ("learning_rate", 0.01, 0.5),
            ("weight_decay", 0.0, 0.1),
            ("adam_beta1", 0.9, 0.8),
            ("adam_beta2", 0.999, 0.95),
            ("adam_epsilon", 1e-8, 1e-6),
            ("optim", "adamw_torch_fused", "sgd"),
            ("seed", 42, 1),
            ("train_sampling_strategy", "sequential", "random"),
        ],
    )
    def test_what_would_be_ignored_is_refused(
        self, name: str, saved: Any, asked: Any, tmp_path: Path, checkpoint: str
    ) -> None:
        message = rf"{name}={saved!r} in the checkpoint and {asked!r} now\. Resume with the settings"
        with pytest.raises(ValueError, match=message):
            train(tmp_path / "run", "no text is read", resume_from_checkpoint=checkpoint, **{name: asked})

    def test_the_trainer_ignores_what_is_refused(self, tmp_path: Path, checkpoint: str) -> None:
        """If this fails, the `Trainer` has learned to take new settings, and they need not be refused."""
        model = MoTForCausalLM.from_pretrained(checkpoint)
        new: dict[str, Any] = {"weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
        trainer = make_trainer(model, tmp_path / "stock", max_steps=3, use_cpu=True, **new)
        trainer.train(resume_from_checkpoint=checkpoint)
        for group in cast(Optimizer, trainer.optimizer).param_groups:
            assert (group["weight_decay"], group["betas"], group["eps"]) == (0.0, (0.9, 0.999), 1e-8)

    def test_schedules_that_look_at_a_metric_keep_their_rate_and_kind(self, tmp_path: Path, source: str) -> None:
        settings: dict[str, Any] = {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "loss"}
        settings |= {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}
        train(tmp_path / "run", source, **settings)
        resume = settings | {"resume_from_checkpoint": "true", "max_steps": 4}
        for changed, message in (
            ({"learning_rate": 0.5}, r"learning_rate=0\.01 in the checkpoint and 0\.5 now"),
            (
                {"lr_scheduler_type": "linear"},
                "lr_scheduler_type='reduce_lr_on_plateau' in the checkpoint",
            ),
            (
                {"metric_for_best_model": "token_loss"},
                "metric_for_best_model='loss' in the checkpoint",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                train(tmp_path / "run", "no text is read", **(resume | changed))
        train(tmp_path / "run", source, **resume)

    def test_what_holds_from_now_on_is_named(
        self, tmp_path: Path, source: str, checkpoint: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        changes: dict[str, Any] = {"lr_scheduler_type": "constant", "max_grad_norm": 0.5}
        trainer = train(tmp_path / "run", source, resume_from_checkpoint=checkpoint, **changes)
        (message,) = [text for text in caplog.messages if "hold from there on" in text]
        assert "lr_scheduler_type='linear' in the checkpoint and 'constant' now" in message
        assert "max_grad_norm=1.0 in the checkpoint and 0.5 now" in message
        assert "max_steps=2 in the checkpoint and 4 now" in message
        rates = {entry["step"]: entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry}
        assert rates[4] == 0.01

    def test_nothing_is_said_of_what_is_the_same(
        self, tmp_path: Path, source: str, checkpoint: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        train(tmp_path / "run", source, resume_from_checkpoint=checkpoint, max_steps=2)
        assert "differ" not in caplog.text

    def test_a_checkpoint_without_arguments_or_with_damaged_ones_is_not_compared(
        self, tmp_path: Path, source: str, checkpoint: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        saved = Path(checkpoint) / "training_args.bin"
        args = TrainingArguments(str(tmp_path), learning_rate=0.01, weight_decay=0.1, report_to="none")
        saved.write_bytes(b"half")
        check_arguments(args, checkpoint)
        assert "training_args.bin' is damaged" in caplog.text
        saved.unlink()
        check_arguments(args, checkpoint)


class TestClassification:
    def finetune(self, folder: Path, base: str, labels: list[str], **arguments: Any) -> None:
        features = Features({"text": Value("string"), "label": ClassLabel(names=labels)})
        rows = {"text": TEXTS[:16], "label": [number % 2 for number in range(16)]}
        data = DatasetDict(dict.fromkeys(["train", "validation"], Dataset.from_dict(rows, features)))
        settings: dict[str, Any] = {"max_steps": 2, "save_steps": 1, "use_cpu": True, "report_to": "none"}
        settings |= {"disable_tqdm": True, "per_device_train_batch_size": 8}
        args = TrainingArguments(str(folder), **(settings | arguments))
        finetune_classification(base, data, args, MethodArguments(monitor_mixing=False))

    def test_other_labels_and_other_tokens_are_refused(self, tmp_path: Path) -> None:
        base = save_base(tmp_path / "base", train_tokenizer(TEXTS, 270))
        self.finetune(tmp_path / "run", base, ["a", "b"])
        resume = {"resume_from_checkpoint": "true", "max_steps": 3}
        with pytest.raises(ValueError, match=r"id2label={1: 'b'} in the checkpoint and {1: 'c', 2: 'd'} now"):
            self.finetune(tmp_path / "run", base, ["a", "c", "d"], **resume)
        self.finetune(tmp_path / "run", base, ["a", "b"], **resume)
        train_tokenizer(NEW_TEXTS, 270).save_pretrained(base)
        with pytest.raises(ValueError, match="differs from the tokenizer of the checkpoint"):
            self.finetune(tmp_path / "run", base, ["a", "b"], **resume)

    def test_a_tokenizer_with_more_tokens_than_the_model_gets_room(self, tmp_path: Path) -> None:
        tokenizer = plain_tokenizer()
        base = save_base(tmp_path / "base", tokenizer)
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        tokenizer.save_pretrained(base)
        self.finetune(tmp_path / "run", base, ["a", "b"])
        config = MoTConfig.from_pretrained(tmp_path / "run")
        assert (config.vocab_size, config.pad_token_id) == (281, 280)


class TestDescription:
    def save(self, folder: Path, model: MoTForCausalLM | MoTForMaskedLM) -> Path:
        """What is added to an empty checkpoint."""
        (folder / "checkpoint-3").mkdir(parents=True)
        callback = CheckpointDescription(model.config, type(model).__name__, train_tokenizer(TEXTS, 270))
        args = TrainingArguments(str(folder), report_to="none")
        callback.on_save(args, TrainerState(global_step=3), None)
        return folder / "checkpoint-3"

    def test_a_checkpoint_without_files_of_its_own_is_compared_by_it(self, tmp_path: Path) -> None:
        model = MoTForMaskedLM(tiny_config())
        checkpoint = self.save(tmp_path, model)
        assert [path.name for path in checkpoint.iterdir()] == ["description"]
        check_settings(model.config, "MoTForMaskedLM", str(checkpoint))
        with pytest.raises(ValueError, match="group_size=4 in the checkpoint and 2 now"):
            check_settings(tiny_config(group_size=2, is_causal=False), "MoTForMaskedLM", str(checkpoint))
        with pytest.raises(ValueError, match="architecture='MoTForMaskedLM' in the checkpoint"):
            check_settings(model.config, "MoTForCausalLM", str(checkpoint))
        tokenizer = load_checkpoint_tokenizer(str(checkpoint))
        assert tokenizer is not None
        assert tokenizer.get_vocab() == train_tokenizer(TEXTS, 270).get_vocab()
        with pytest.raises(ValueError, match=r"weight_decay=0\.0 in the checkpoint and 0\.1 now"):
            check_arguments(TrainingArguments(str(tmp_path), weight_decay=0.1), str(checkpoint))

    def test_a_whole_checkpoint_gets_nothing(self, checkpoint: str) -> None:
        assert not (Path(checkpoint) / "description").exists()
        assert json.loads((Path(checkpoint) / "config.json").read_text())["architectures"] == ["MoTForCausalLM"]


def test_early_stopping_can_be_added_to_a_run(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps"}
    settings |= {"eval_steps": 2, "metric_for_best_model": "loss", "load_best_model_at_end": True}
    make_trainer(MoTForCausalLM(tiny_config()), tmp_path, **settings).train()
    trainer = make_trainer(MoTForCausalLM(tiny_config()), tmp_path, **settings)
    add_callbacks(trainer, MethodArguments(early_stopping_patience=3))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    saved = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["EarlyStoppingCallback"]["args"]["early_stopping_patience"] == 3


@pytest.mark.parametrize(
    ("arguments", "is_said"),
    [
        ({"save_strategy": "steps", "save_only_model": True}, True),
        ({"save_strategy": "steps", "save_only_model": False}, False),
        ({"save_strategy": "no", "save_only_model": True}, False),
    ],
)
def test_checkpoints_that_cannot_be_resumed_are_warned_of_at_the_start(
    arguments: dict[str, Any], is_said: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(MoTForCausalLM(tiny_config()), tmp_path, max_steps=1, **arguments)
    add_callbacks(trainer)
    trainer.train()
    assert ("have no optimizer state (save_only_model=True)" in caplog.text) is is_said
