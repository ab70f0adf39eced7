"""Arguments that would train nothing, fail late or keep the wrong model, before anything is read."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from mot_hf import MoTForCausalLM
from mot_hf.data.tokenizer import train_tokenizer
from mot_hf.training import MethodArguments, add_callbacks
from mot_hf.training.checks import check_run
from tests.models import tiny_config
from tests.training.language_runs import TEXTS, save_base, train, write_text
from tests.training.trainers import make_trainer, model_of


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": 0}, "`max_steps=0` must be at least 1"),
        ({"max_steps": -5}, "`max_steps=-5` must be at least 1"),
        ({"max_steps": -1, "num_train_epochs": 0}, "`num_train_epochs=0` must be greater than 0"),
        ({"gradient_accumulation_steps": -1}, "`gradient_accumulation_steps=-1` must be at least 1"),
        ({"per_device_train_batch_size": 0}, "`per_device_train_batch_size=0` must be at least 1"),
        ({"per_device_eval_batch_size": -3}, "`per_device_eval_batch_size=-3` must be at least 1"),
        ({"eval_accumulation_steps": 0}, "`eval_accumulation_steps=0` must be at least 1"),
    ],
)
def test_a_run_that_would_train_or_evaluate_nothing_is_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        check_run(TrainingArguments(str(tmp_path), **settings), MethodArguments())
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", "no text", **settings)
    assert not (tmp_path / "run").exists()


def test_early_stopping_looks_at_the_loss_by_default(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), eval_strategy="steps", eval_steps=1)
    check_run(args, MethodArguments(early_stopping_patience=2))
    assert (args.metric_for_best_model, args.greater_is_better) == ("loss", False)
    settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 10.0, "max_steps": 20}
    trainer = train(tmp_path / "run", write_text(tmp_path / "text"), method={"early_stopping_patience": 2}, **settings)
    assert trainer.state.global_step < 20


def test_early_stopping_without_evaluations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`early_stopping_patience=2` counts evaluations, and `eval_strategy=no`"):
        train(tmp_path / "run", "no text", method={"early_stopping_patience": 2})


@pytest.mark.parametrize(
    ("metric", "greater"),
    [("perplexity", False), ("eval_bits_per_byte", False), ("token_loss", False), ("accuracy", True)],
)
def test_the_best_model_is_the_one_with_the_best_value(metric: str, greater: bool, tmp_path: Path) -> None:
    best = {"metric_for_best_model": metric, "load_best_model_at_end": True}
    args = TrainingArguments(str(tmp_path), eval_strategy="steps", save_strategy="steps", **best)
    check_run(args, MethodArguments())
    assert args.greater_is_better is greater
    settings = {"eval_strategy": "steps", "save_strategy": "steps", **best}
    trainer = make_trainer(MoTForCausalLM(tiny_config()), tmp_path, **settings)
    add_callbacks(trainer)
    assert trainer.args.greater_is_better is greater


def test_a_metric_that_no_evaluation_gives_is_refused_at_once(tmp_path: Path) -> None:
    best = {"metric_for_best_model": "moe_loss", "eval_strategy": "steps", "eval_steps": 1}
    with pytest.raises(ValueError, match="`metric_for_best_model='moe_loss'` must be one of loss, token_loss, perpl"):
        train(tmp_path / "run", "no text", **best)


def test_adapters_learn_the_tokens_that_are_new(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 280)
    base = save_base(tmp_path / "base", tokenizer)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "larger")
    corpus = {"tokenizer": str(tmp_path / "larger")}
    text, model = write_text(tmp_path / "text"), {"model_name_or_path": base}
    trainer = train(tmp_path / "run", text, model=model, corpus=corpus, method={"lora_rank": 2}, max_steps=1)
    learned = {name: value.shape for name, value in model_of(trainer).named_parameters() if value.requires_grad}
    assert [shape[0] for name, shape in learned.items() if "token_adapter" in name] == [1, 1]
    assert not [name for name in learned if "lora" not in name and "token_adapter" not in name]


def test_adapters_of_a_new_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`lora_rank=2` trains adapters of a trained model, and only they are saved"):
        train(tmp_path / "run", "no text", method={"lora_rank": 2})


def test_a_checkpoint_in_half_precision_is_trained_in_float32(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", train_tokenizer(TEXTS, 280))
    MoTForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    trainer = train(tmp_path / "run", write_text(tmp_path / "text"), model={"model_name_or_path": base}, max_steps=1)
    assert {parameter.dtype for parameter in model_of(trainer).parameters()} == {torch.float32}
    assert MoTForCausalLM.from_pretrained(tmp_path / "run").dtype == torch.float32
