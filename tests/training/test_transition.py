"""Transition tuning in runs of the real `Trainer`."""

import logging
from pathlib import Path
from typing import Any, cast
from unittest.mock import MagicMock

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from mot_hf import MoTForCausalLM, MoTForMaskedLM, MoTForSequenceClassification
from mot_hf.training import GroupSizeCheck, MethodArguments, TransitionTuning, add_callbacks
from tests.models import MODES, tiny_config, trained
from tests.training.trainers import ROWS, losses_of, make_trainer, model_of


class ModesSeen(TrainerCallback):
    """Keeps the mode and the flag of the load-balancing loss in which every step ran."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bool]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.seen.append((model.config.mixing, model.config.output_router_logits))


@pytest.mark.parametrize("head", [MoTForCausalLM, MoTForMaskedLM])
def test_the_switch_comes_at_its_share_and_stays(head: type, tmp_path: Path) -> None:
    seen = ModesSeen()
    trainer = make_trainer(head(tiny_config()), tmp_path, [seen], max_steps=10, save_strategy="steps", save_steps=5)
    trainer.add_callback(TransitionTuning(trainer, 0.7))
    trainer.train()
    assert seen.seen == [("cross_example", False)] * 7 + [("moe", True)] * 3
    before, after = (head.from_pretrained(tmp_path / f"checkpoint-{step}").config for step in (5, 10))
    assert (before.mixing, before.inference_mixing) == ("cross_example", "per_sequence")
    assert (after.mixing, after.inference_mixing, after.output_router_logits) == ("moe", "moe", False)


def test_the_losses_of_all_modes_are_logged_at_the_switch_and_at_every_evaluation(tmp_path: Path) -> None:
    model = MoTForCausalLM(tiny_config())
    trainer = make_trainer(model, tmp_path, max_steps=6, eval_strategy="steps", eval_steps=3)
    trainer.add_callback(TransitionTuning(trainer, 0.5))
    trainer.train()
    history = trainer.state.log_history
    for mode in MODES:
        assert [entry["step"] for entry in history if f"eval_{mode}_loss" in entry] == [3, 6]  # at the switch once
    last = {mode: entry[f"eval_{mode}_loss"] for entry in history for mode in MODES if f"eval_{mode}_loss" in entry}
    ids = torch.tensor(ROWS[:16])
    with torch.no_grad():
        for mode in MODES:
            assert last[mode] == pytest.approx(float(model.eval()(ids, labels=ids, mixing=mode).loss), rel=1e-5)
    plain = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    modes = {mode: [entry[f"eval_{mode}_loss"] for entry in history if f"eval_{mode}_loss" in entry] for mode in MODES}
    assert plain == [modes["per_sequence"][0], modes["moe"][-1]]


def test_the_load_balancing_loss_is_trained_on_after_the_switch_only(tmp_path: Path) -> None:
    losses = []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        trainer = make_trainer(MoTForCausalLM(tiny_config(router_aux_loss_coef=weight)), tmp_path, max_steps=4)
        trainer.add_callback(TransitionTuning(trainer, 0.5))
        trainer.train()
        losses.append(losses_of(trainer))
    assert losses[0][:2] == losses[1][:2]
    assert all(with_it > without + 0.5 for without, with_it in zip(losses[0][2:], losses[1][2:], strict=True))


def test_a_run_resumed_before_or_after_the_switch_goes_on_identically(tmp_path: Path) -> None:
    def run(resume: int | None) -> list[float]:
        torch.manual_seed(0)
        model = MoTForCausalLM(tiny_config())
        trainer = make_trainer(model, tmp_path, max_steps=8, save_strategy="steps", save_steps=2)
        trainer.add_callback(TransitionTuning(trainer, 0.5))
        trainer.train(resume_from_checkpoint=resume and str(tmp_path / f"checkpoint-{resume}"))
        return losses_of(trainer)

    whole = run(None)
    assert run(2) == whole
    assert run(6) == whole


def test_a_finished_model_is_tuned_from_the_first_step_on(tmp_path: Path) -> None:
    seen = ModesSeen()
    model = MoTForCausalLM(tiny_config())
    trainer = make_trainer(model, tmp_path, [seen], max_steps=2)
    trainer.add_callback(TransitionTuning(trainer, 0.0))
    trainer.train()
    trainer.save_model()
    assert [mode for mode, _ in seen.seen] == ["moe", "moe"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.inference_mixing == "moe"


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_run_goes_on_in_mode_per_sequence(share: float, tmp_path: Path) -> None:
    seen = ModesSeen()
    model = MoTForCausalLM(tiny_config(live_companions=True))
    trainer = make_trainer(model, tmp_path, [seen], max_steps=4, save_strategy="steps", save_steps=4)
    trainer.add_callback(TransitionTuning(trainer, share, "per_sequence"))
    trainer.train()
    num_mixed = round(4 * share)
    assert seen.seen == [("cross_example", False)] * num_mixed + [("per_sequence", False)] * (4 - num_mixed)
    config = MoTForCausalLM.from_pretrained(tmp_path / "checkpoint-4").config
    assert (config.mixing, config.inference_mixing) == ("per_sequence", "per_sequence")
    counts = {int(value) for name, value in model.named_buffers() if name.endswith("num_batches_tracked")}
    assert counts == {4}  # statistics are gathered in both modes


def test_a_run_that_begins_again_mixes_again(tmp_path: Path) -> None:
    seen = ModesSeen()
    trainer = make_trainer(MoTForCausalLM(tiny_config()), tmp_path, [seen], max_steps=4)
    trainer.add_callback(TransitionTuning(trainer, 0.5))
    trainer.train()
    trainer.train()
    assert [mode for mode, _ in seen.seen] == (["cross_example"] * 2 + ["moe"] * 2) * 2


def test_a_loss_that_leaves_out_load_balancing_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(MoTForCausalLM(tiny_config()), tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"`label_smoothing_factor=0\.1` makes a loss of its own"):
        TransitionTuning(trainer, 0.5)
    TransitionTuning(trainer, 0.5, "per_sequence")
    trained_so = MoTForCausalLM(tiny_config(mixing="moe", output_router_logits=True))
    with pytest.raises(ValueError, match=r"`label_smoothing_factor=0\.1` makes a loss of its own"):
        add_callbacks(make_trainer(trained_so, tmp_path, label_smoothing_factor=0.1))


def test_losses_without_load_balancing_are_smoothed(tmp_path: Path) -> None:
    without = MoTForCausalLM(tiny_config(mixing="moe", output_router_logits=True, router_aux_loss_coef=0.0))
    classifier = MoTForSequenceClassification(tiny_config(mixing="moe", output_router_logits=True))
    for model in (without, classifier):
        trainer = make_trainer(model, tmp_path, label_smoothing_factor=0.1)
        TransitionTuning(trainer, 0.5)
        add_callbacks(trainer)


def test_a_model_without_a_configuration_gets_its_callbacks(tmp_path: Path) -> None:
    trainer = Trainer(torch.nn.Linear(2, 2), TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    add_callbacks(trainer, MethodArguments(monitor_mixing=False))


def test_an_unknown_mode_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(MoTForCausalLM(tiny_config()), tmp_path)
    with pytest.raises(ValueError, match="`mode='cross_example'` must be one of 'moe', 'per_sequence'"):
        TransitionTuning(trainer, 0.5, "cross_example")


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_out_of_range_is_refused(share: float, tmp_path: Path) -> None:
    trainer = make_trainer(MoTForCausalLM(tiny_config()), tmp_path)
    with pytest.raises(ValueError, match=r"`share=.*` must be in \[0, 1\)"):
        TransitionTuning(trainer, share)


def test_a_model_without_mot_layers_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(MoTForCausalLM(tiny_config(mlp_layer_types=["dense"] * 4)), tmp_path)
    with pytest.raises(ValueError, match="no MoT layers to tune"):
        TransitionTuning(trainer, 0.9)


def test_the_switch_is_at_the_nearest_step_whatever_the_rounding_of_the_share(tmp_path: Path) -> None:
    model = MoTForCausalLM(tiny_config())
    trainer = make_trainer(model, tmp_path)
    trainer.eval_dataset = None
    tuning = TransitionTuning(trainer, 0.58)
    assert 0.58 * 50 < 29
    modes = []
    for step in (28, 29):
        state = TrainerState(max_steps=50, global_step=step)
        tuning.on_step_begin(trainer.args, state, trainer.control, model=model)
        modes.append(model.config.mixing)
    assert modes == ["cross_example", "moe"]


@pytest.mark.parametrize("share", [0.94, 0.99])
def test_the_last_step_at_least_is_in_the_new_mode(share: float, tmp_path: Path) -> None:
    seen = ModesSeen()
    trainer = make_trainer(MoTForCausalLM(tiny_config()), tmp_path, [seen], max_steps=4)
    trainer.add_callback(TransitionTuning(trainer, share))
    trainer.train()
    assert [mode for mode, _ in seen.seen] == ["cross_example"] * 3 + ["moe"]


@pytest.mark.parametrize("mode", ["moe", "per_sequence"])
def test_evaluations_at_the_switch_make_no_other_callback_warn(
    mode: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = trained(MoTForCausalLM(tiny_config()))
    trainer = make_trainer(model, tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer.args.metric_for_best_model, trainer.args.greater_is_better = "loss", False
    trainer.args.load_best_model_at_end = True
    trainer.add_callback(GroupSizeCheck())
    trainer.add_callback(EarlyStoppingCallback(5))
    trainer.add_callback(TransitionTuning(trainer, 0.0, mode))
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert [record.getMessage() for record in caplog.records] == []
    assert any(isinstance(each, EarlyStoppingCallback) for each in trainer.callback_handler.callbacks)


def test_several_data_sets_are_evaluated_once_in_every_mode(tmp_path: Path) -> None:
    settings = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(MoTForCausalLM(tiny_config()), tmp_path, **settings)
    trainer.eval_dataset = {name: cast(Any, trainer.eval_dataset) for name in ("a", "b")}
    trainer.add_callback(TransitionTuning(trainer, 0.5))
    trainer.train()
    for mode in MODES:
        for name in ("a", "b"):
            steps = [entry["step"] for entry in trainer.state.log_history if f"eval_{mode}_{name}_loss" in entry]
            assert steps == [2, 4]


def test_a_trainer_that_does_not_evaluate_is_not_made_to(tmp_path: Path) -> None:
    trainer = make_trainer(MoTForCausalLM(tiny_config()), tmp_path, max_steps=2)
    assert trainer.eval_dataset is not None
    trainer.add_callback(TransitionTuning(trainer, 0.5))
    trainer.train()
    assert not [entry for entry in trainer.state.log_history if any("eval" in name for name in entry)]


def test_an_evaluation_that_fails_leaves_the_next_one_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(MoTForCausalLM(tiny_config()), tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
    tuning = TransitionTuning(trainer, 0.5)
    trainer.add_callback(tuning)
    monkeypatch.setattr(trainer, "evaluate", MagicMock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tuning.evaluate_modes(model_of(trainer))
    monkeypatch.undo()
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "eval_moe_loss" in entry] == [1, 2]


def test_router_logits_that_were_asked_for_before_the_switch_stay(tmp_path: Path) -> None:
    seen = ModesSeen()
    model = MoTForCausalLM(tiny_config(mixing="moe", output_router_logits=True))
    trainer = make_trainer(model, tmp_path, [seen], max_steps=4)
    trainer.add_callback(TransitionTuning(trainer, 0.5, "per_sequence"))
    trainer.train()
    assert seen.seen == [("moe", True)] * 2 + [("per_sequence", False)] * 2


@pytest.mark.parametrize("head", [MoTForCausalLM, MoTForMaskedLM])
def test_the_load_balancing_loss_does_not_depend_on_accumulation(head: type, tmp_path: Path) -> None:
    results = []
    for num_rows, num_parts in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        model = head(tiny_config(mixing="moe", router_aux_loss_coef=1.0, output_router_logits=True))
        settings = {"per_device_train_batch_size": num_rows, "gradient_accumulation_steps": num_parts}
        trainer = make_trainer(model, tmp_path, max_steps=1, **settings)
        row = [[4, 7, 2, 9, 4, 1, 3, 8, 6, 5, 2, 3]] * 8  # the same, so that every part has the loss of all
        trainer.train_dataset = Dataset.from_dict({"input_ids": row, "labels": row})
        trainer.train()
        results.append([trainer.state.log_history[0][name] for name in ("loss", "grad_norm")])
    assert results[1] == pytest.approx(results[0], rel=1e-4)
