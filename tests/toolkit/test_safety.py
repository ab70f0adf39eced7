"""Runs that cannot go on say so, and leave the last good checkpoint as it was."""

import errno
import hashlib
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from mot_hf import MoTForCausalLM
from mot_hf.training import DiskSpaceCheck, FiniteCheck, find_last_checkpoint, run_training
from mot_hf.training.safety import explain_failures
from tests.models import tiny_config
from tests.toolkit.training import make_trainer

SAVING = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2}


class Spoil(TrainerCallback):
    """Makes a parameter infinite before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                model.lm_head.weight[0, 0] = torch.nan


class SpoilGradient(TrainerCallback):
    """Makes one entry of a large gradient infinite, which no loss shows in this step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if state.global_step == 3:
            model.lm_head.weight.grad[0, 0] = torch.nan


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


def test_a_loss_that_is_not_a_number_stops_the_run_before_the_model_is_spoilt(tmp_path: Path) -> None:
    model = MoTForCausalLM(tiny_config())
    trainer = make_trainer(model, tmp_path, [Spoil(5), FiniteCheck()], **SAVING, save_total_limit=1)
    with pytest.raises(FloatingPointError, match=r"loss is not a finite number at step 6.*checkpoint-4.*lower"):
        trainer.train()
    assert find_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert not (tmp_path / "checkpoint-6").exists()
    loaded = MoTForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert all(parameter.isfinite().all() for parameter in loaded.parameters())


def test_a_spoilt_model_is_not_saved(tmp_path: Path) -> None:
    model = MoTForCausalLM(tiny_config())
    trainer = make_trainer(model, tmp_path, [SpoilGradient(), FiniteCheck()], **SAVING)
    with pytest.raises(FloatingPointError, match="A parameter is not a finite number at step 4; nothing was saved"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_without_a_checkpoint_the_advice_is_to_start_again(tmp_path: Path) -> None:
    trainer = make_trainer(MoTForCausalLM(tiny_config()), tmp_path, [Spoil(0), FiniteCheck()], **SAVING)
    with pytest.raises(FloatingPointError, match=r"at step 1; nothing was saved\. Start again"):
        trainer.train()


@pytest.fixture
def short_files() -> Iterator[TrainerCallback]:
    """Lets no file grow above 20 kB, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Limit(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

    yield Limit()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_checkpoint_that_cannot_be_written_is_explained_and_the_last_good_one_untouched(
    tmp_path: Path, short_files: TrainerCallback
) -> None:
    trainer = make_trainer(MoTForCausalLM(tiny_config()), tmp_path, [short_files], **SAVING, save_total_limit=1)
    before: list[str] = []

    class Remember(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            before.append(digest(tmp_path / "checkpoint-2"))

    trainer.add_callback(Remember())
    with pytest.raises(
        OSError, match=r"checkpoint could not be written .*checkpoint-2.*--resume_from_checkpoint true"
    ):
        run_training(trainer, None)
    assert find_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert digest(tmp_path / "checkpoint-2") == before[0]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:626] . PytorchStreamWriter failed writing file data/0"),
    ],
)
def test_what_libraries_say_of_a_full_disk(error: Exception, tmp_path: Path) -> None:
    trainer = make_trainer(MoTForCausalLM(tiny_config()), tmp_path)
    with (
        pytest.raises(OSError, match="checkpoint could not be written") as caught,
        explain_failures(trainer.args),
    ):
        raise error
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.__cause__ is error


def test_text_that_can_no_longer_be_read(tmp_path: Path) -> None:
    trainer = make_trainer(MoTForCausalLM(tiny_config()), tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    message = r"Reading the text was interrupted \(Server Disconnected\).*checkpoint-2: go on with"
    with pytest.raises(OSError, match=message), explain_failures(trainer.args):
        raise ConnectionError("Server Disconnected")


@pytest.mark.parametrize("error", [OSError("no such data set"), RuntimeError("CUDA out of memory"), ValueError("?")])
def test_other_errors_pass(error: Exception, tmp_path: Path) -> None:
    trainer = make_trainer(MoTForCausalLM(tiny_config()), tmp_path)
    with pytest.raises(type(error)) as caught, explain_failures(trainer.args):
        raise error
    assert caught.value is error


class TestDiskSpace:
    @pytest.fixture(autouse=True)
    def small_disk(self, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = shutil.disk_usage("/")._replace(free=100_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    def test_a_run_whose_checkpoint_does_not_fit_is_not_started(self, tmp_path: Path) -> None:
        trainer = make_trainer(MoTForCausalLM(tiny_config()), tmp_path / "new", [DiskSpaceCheck()], **SAVING)
        with pytest.raises(OSError, match=r"A checkpoint takes about .* GB free"):
            trainer.train()
        assert trainer.state.global_step == 0

    def test_a_run_that_saves_nothing_is(self, tmp_path: Path) -> None:
        trainer = make_trainer(MoTForCausalLM(tiny_config()), tmp_path, [DiskSpaceCheck()], max_steps=1)
        assert trainer.train().global_step == 1
