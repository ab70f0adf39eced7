"""Arguments that the `Trainer` takes and would fail at later are refused at once, by their names."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from mot_cli import run
from mot_hf.training import CorpusArguments
from mot_hf.training.checks import refuse_arguments

SCHEDULES = [
    ("warmup_stable_decay", None, "missing 1 required positional argument: 'num_decay_steps'"),
    ("linear", {"foo": 1}, "unexpected keyword argument 'foo'"),
    ("linear", "foo", "must be a mapping, not str"),
    ("inverse_sqrt", {"timescale": 0}, "division by zero"),
    ("polynomial", {"power": "x"}, "unsupported operand"),
    ("cosine_with_min_lr", None, "One of min_lr or min_lr_rate"),
]
ARGUMENTS = [
    ({"output_dir": ""}, "`output_dir` is empty: name a folder"),
    ({"num_train_epochs": float("nan")}, "`num_train_epochs=nan` must be a finite number"),
    ({"warmup_steps": float("nan")}, "`warmup_steps=nan` must be a finite number"),
    ({"neftune_noise_alpha": -5.0}, "`neftune_noise_alpha=-5.0` must be a number from 0 up"),
    ({"torch_compile_backend": "foo"}, "`torch_compile_backend='foo'` must be one of no, .*inductor"),
    ({"torch_compile_mode": "foo"}, "`torch_compile_mode='foo'` must be one of default, .*max-autotune"),
    ({"optim_args": "foo"}, "`optim=adamw.*` with `optim_args='foo'` cannot be made: .* Write optim_args like mom"),
    ({"optim": "sgd", "optim_args": "momentum=x"}, "`optim=sgd` with `optim_args='momentum=x'` .* to float: 'x'"),
]


def make_arguments(folder: Path, **arguments: Any) -> TrainingArguments:
    return TrainingArguments(**({"output_dir": str(folder), "report_to": "none", "use_cpu": True} | arguments))


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS)
def test_values_that_fail_later_are_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    args = make_arguments(tmp_path, **arguments)
    with pytest.raises(ValueError, match=message):
        refuse_arguments(args)


@pytest.mark.parametrize(("kind", "settings", "reason"), SCHEDULES)
@pytest.mark.parametrize("max_steps", [-1, 6])
def test_a_schedule_that_cannot_be_made_is_refused(
    kind: str, settings: Any, reason: str, max_steps: int, tmp_path: Path
) -> None:
    args = make_arguments(tmp_path, max_steps=max_steps, lr_scheduler_type=kind, lr_scheduler_kwargs=settings)
    with pytest.raises(ValueError, match=f"`lr_scheduler_kwargs=.*` do not fit `lr_scheduler_type={kind}`.*{reason}"):
        refuse_arguments(args)


def test_what_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.trainer_optimizer.is_lomo_available", lambda: False)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    with pytest.raises(ValueError, match="`optim=lomo` cannot be made: You need to install `lomo_optim`"):
        refuse_arguments(make_arguments(tmp_path, optim="lomo"))
    with pytest.raises(ValueError, match=r"`report_to=\['wandb'\]` does not work here: .* requires wandb"):
        refuse_arguments(make_arguments(tmp_path, report_to="wandb"))


def test_offloading_to_nowhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = pytest.importorskip("trl").SFTConfig(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, activation_offloading=True
    )
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: None)
    with pytest.raises(ValueError, match="`activation_offloading=True` needs an accelerator"):
        refuse_arguments(arguments)


def test_an_optimizer_that_needs_the_model_is_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.trainer_optimizer.is_lomo_available", lambda: True)
    refuse_arguments(make_arguments(tmp_path, optim="lomo"))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2}, "max_steps": 1},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}, "warmup_steps": 500},
        {
            "lr_scheduler_type": "reduce_lr_on_plateau",
            "lr_scheduler_kwargs": {"patience": 1},
            "eval_strategy": "steps",
        },
        {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=true", "neftune_noise_alpha": 5.0},
        {"torch_compile_mode": "reduce-overhead"},
        {"torch_compile_mode": "foo", "torch_compile_backend": "eager"},
        {"warmup_steps": 0.1, "learning_rate": 0.0, "report_to": "tensorboard"},
    ],
)
def test_values_that_work_pass(arguments: dict[str, Any], tmp_path: Path) -> None:
    refuse_arguments(make_arguments(tmp_path, **arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr_scheduler_kwargs", '{"foo": 1}'], "error: `lr_scheduler_kwargs={'foo': 1}` do not fit"),
        (["--accelerator_config", '{"foo": 1}'], "error: `accelerator_config`: AcceleratorConfig.__init__() got an"),
    ],
)
def test_commands_refuse_before_they_read(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a", "label": 0}))
    command = ["mot", "finetune", "--model_name_or_path", "absent", "--source", str(tmp_path / "rows.jsonl")]
    monkeypatch.setattr("sys.argv", [*command, "--output_dir", str(tmp_path / "run"), *arguments])
    with pytest.raises(SystemExit, match="1"):
        run()
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_a_share_of_masked_tokens_that_trains_nothing_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=f"`mlm_probability={share}` must be greater than 0 and at most 1"):
        CorpusArguments(mlm_probability=share)
    assert CorpusArguments(mlm_probability=1.0).mlm_probability == 1
