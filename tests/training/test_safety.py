"""Runs that cannot go on say so, and leave the last good checkpoint as it was."""

import errno
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.distributed import DistributedConfig

from mot_hf import MoTForCausalLM
from mot_hf.data.tokenizer import train_tokenizer
from mot_hf.training import DiskSpaceCheck, FiniteCheck, add_callbacks, add_lora, find_last_checkpoint, run_training
from mot_hf.training.safety import explain_failures
from tests.models import tiny_config
from tests.processes import pretend, spread
from tests.training.trainers import make_trainer

REPOSITORY = Path(__file__).parents[2]
SAVING = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2}


class Spoil(TrainerCallback):
    """Makes a parameter infinite before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, model: MoTForCausalLM, **kwargs: Any) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                model.lm_head.weight[0, 0] = torch.nan


class SpoilGradient(TrainerCallback):
    """Makes one entry of a large gradient infinite, which no loss shows in this step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: MoTForCausalLM, **kwargs: Any) -> None:
        if state.global_step == 3:
            assert model.lm_head.weight.grad is not None
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


class SpoilLast(TrainerCallback):
    """Makes a parameter infinite in the last step, after the optimizer."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: MoTForCausalLM, **kwargs: Any) -> None:
        if state.global_step == state.max_steps - 1:
            with torch.no_grad():
                model.lm_head.weight[0, 0] = torch.inf


@pytest.mark.parametrize("strategy", ["epoch", "no"])
def test_a_model_that_is_spoilt_last_is_not_saved(strategy: str, tmp_path: Path) -> None:
    settings = {"num_train_epochs": 1, "save_strategy": strategy}
    trainer = make_trainer(MoTForCausalLM(tiny_config()), tmp_path, [SpoilLast()], **settings)
    add_callbacks(trainer)
    with pytest.raises(FloatingPointError, match="A parameter is not a finite number at step 8; nothing was saved"):
        run_training(trainer, None)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_without_a_checkpoint_the_advice_is_to_start_again(tmp_path: Path) -> None:
    trainer = make_trainer(MoTForCausalLM(tiny_config()), tmp_path, [Spoil(0), FiniteCheck()], **SAVING)
    with pytest.raises(FloatingPointError, match=r"at step 1; nothing was saved\. Start again"):
        trainer.train()


def test_settings_that_cannot_be_saved_are_refused_before_the_first_step(tmp_path: Path) -> None:
    model = MoTForCausalLM(tiny_config())
    model.generation_config.update(do_sample=False, temperature=0.5)
    trainer = make_trainer(model, tmp_path, **SAVING)
    add_callbacks(trainer)
    with pytest.raises(ValueError, match=r"`do_sample` to true in the generation_config.json (.|\n)*`temperature`"):
        run_training(trainer, None)
    assert trainer.state.global_step == 0


def test_adapters_are_trained_whatever_the_settings(tmp_path: Path) -> None:
    model = MoTForCausalLM(tiny_config())
    model.generation_config.update(do_sample=False, temperature=0.5)
    trainer = make_trainer(add_lora(model, rank=2), tmp_path, **(SAVING | {"max_steps": 2}))
    add_callbacks(trainer)
    run_training(trainer, None)
    assert (tmp_path / "adapter_model.safetensors").is_file()


class KeepScales(TrainerCallback):
    """Remembers the scale of a float16 run's loss after every step."""

    def __init__(self) -> None:
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-12)
        self.scales: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.scales.append(self.scaler.get_scale())


def make_float16_trainer(model: MoTForCausalLM, folder: Path, scales: KeepScales, **arguments: Any) -> Trainer:
    """What `--fp16` makes of a trainer on a GPU: accelerate has its scaler for no CPU, torch has."""
    trainer = make_trainer(model, folder, [FiniteCheck(), scales], **arguments)
    trainer.args.fp16 = True
    trainer.accelerator.state._mixed_precision = "fp16"
    trainer.accelerator.native_amp, trainer.accelerator.scaler = True, scales.scaler
    return trainer


def test_a_step_that_a_float16_scaler_skips_is_none_to_stop_at(tmp_path: Path) -> None:
    model, scales = MoTForCausalLM(tiny_config()), KeepScales()
    trainer = make_float16_trainer(model, tmp_path, scales, **(SAVING | {"max_steps": 4, "save_steps": 1}))
    assert trainer.train().global_step == 4
    # Skipped are the steps at which the scale falls: gradients of 2 ** 40 and 2 ** 28 times the loss are infinite.
    assert scales.scales == [2.0**28, 2.0**16, 2.0**16, 2.0**16]
    norms = torch.tensor([entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry])
    assert norms.isfinite().tolist() == [False, False, True, True]
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert find_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_a_float16_model_that_is_spoilt_is_not_saved(tmp_path: Path) -> None:
    trainer = make_float16_trainer(MoTForCausalLM(tiny_config()), tmp_path, KeepScales(), **SAVING)
    trainer.add_callback(Spoil(3))
    with pytest.raises(FloatingPointError, match="A parameter is not a finite number at step 4; nothing was saved"):
        trainer.train()


class Limit(TrainerCallback):
    """Lets no file grow above a size once a checkpoint is written, as on a disk that is full."""

    def __init__(self, size: int, step: int) -> None:
        self.size, self.step = size, step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextmanager
def files_of_any_size() -> Iterator[None]:
    """Ends a limit with the test, before pytest writes again: its output may be a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def limit_before(monkeypatch: pytest.MonkeyPatch, owner: Any, function: str, number: int) -> None:
    """Let a function write no more than 100 bytes when it is called for the given time."""
    write, calls = getattr(owner, function), []

    def write_little(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == number:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return write(*args, **kwargs)

    monkeypatch.setattr(owner, function, write_little)


# Where a checkpoint is written, and what the second one's call is called for: torch.save saves arguments, optimizer,
# scheduler and random states.
WRITERS = [
    pytest.param(PreTrainedModel, "save_pretrained", 2, id="weights"),
    pytest.param(PreTrainedTokenizerBase, "save_pretrained", 2, id="tokenizer"),
    pytest.param(torch, "save", 5, id="arguments"),
    pytest.param(torch, "save", 6, id="optimizer"),
    pytest.param(torch, "save", 7, id="scheduler"),
    pytest.param(torch, "save", 8, id="random_states"),
    pytest.param(TrainerState, "save_to_json", 2, id="state"),
]


@pytest.mark.parametrize(("owner", "function", "number"), WRITERS)
@files_of_any_size()
def test_a_checkpoint_that_cannot_be_written_is_explained_and_the_last_good_one_untouched(
    owner: Any, function: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_before(monkeypatch, owner, function, number)
    trainer = make_trainer(MoTForCausalLM(tiny_config()), tmp_path, **SAVING, save_total_limit=1)
    trainer.processing_class = train_tokenizer(["some words"], vocab_size=260)
    before: list[str] = []

    class Remember(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            before.append(digest(tmp_path / "checkpoint-2"))

    trainer.add_callback(Remember())
    with pytest.raises(OSError, match=r"could not be written .*checkpoint-2: free .*--resume_from_checkpoint true"):
        run_training(trainer, None)
    assert trainer.state.global_step == 4
    assert find_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert digest(tmp_path / "checkpoint-2") == before[0]


@files_of_any_size()
def test_a_model_that_cannot_be_saved_at_the_end_leaves_the_one_that_was_there(tmp_path: Path) -> None:
    MoTForCausalLM(tiny_config()).save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    trainer = make_trainer(MoTForCausalLM(tiny_config()), tmp_path, [Limit(20_000, step=8)], **SAVING)
    with pytest.raises(OSError, match=r"could not be written .*checkpoint-8: free .*--resume_from_checkpoint true"):
        run_training(trainer, None)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob("_*"))


def may_mount() -> bool:
    """Whether this machine lets a process have a small disk of its own."""
    command = ["unshare", "-Urm", "sh", "-c", "mount -t tmpfs -o size=1m none /mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not may_mount(), reason="a disk of one's own is not allowed here")
def test_a_disk_that_is_full_at_any_file_of_a_checkpoint(tmp_path: Path) -> None:
    mount = (
        f"mount -t tmpfs -o size=8m none {tmp_path} && exec {sys.executable} -m tests.training.fill_disk {tmp_path}"
    )
    done = subprocess.run(["unshare", "-Urm", "sh", "-c", mount], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout.splitlines()[-1])
    written = {"model.safetensors", "tokenizer.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert written | {"config.json", "training_args.bin", "trainer_state.json"} < outcomes.keys()
    causes = {name: outcome.pop("cause") for name, outcome in outcomes.items()}
    assert set(causes.values()) == {"OSError", "SafetensorError", "RuntimeError", "Exception"}
    for name, outcome in outcomes.items():
        assert outcome["error"] == "OSError", name
        assert "could not be written" in outcome["message"], name
        assert "The last good checkpoint is " in outcome["message"], name
        assert "/checkpoint-2: free some space" in outcome["message"], name
        assert outcome["last"] == "checkpoint-2", name
        assert outcome["damage"], name
        assert outcome["afterwards"] is None, name


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_what_the_system_says_of_a_full_disk_is_explained_wherever_it_is_met(error: int, tmp_path: Path) -> None:
    trainer = make_trainer(MoTForCausalLM(tiny_config()), tmp_path)
    with (
        pytest.raises(OSError, match="could not be written") as caught,
        explain_failures(trainer.args),
    ):
        raise OSError(error, os.strerror(error))
    assert caught.value.errno == error


def test_text_that_can_no_longer_be_read(tmp_path: Path) -> None:
    trainer = make_trainer(MoTForCausalLM(tiny_config()), tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    message = r"Reading the text was interrupted \(Server Disconnected\).*checkpoint-2: continue with"
    with pytest.raises(OSError, match=message), explain_failures(trainer.args):
        raise ConnectionError("Server Disconnected")


@pytest.mark.parametrize("error", [OSError("no such data set"), RuntimeError("CUDA out of memory"), ValueError("?")])
def test_other_errors_pass(error: Exception, tmp_path: Path) -> None:
    trainer = make_trainer(MoTForCausalLM(tiny_config()), tmp_path)
    with pytest.raises(type(error)) as caught, explain_failures(trainer.args):
        raise error
    assert caught.value is error


def test_an_error_in_a_save_that_is_none_of_the_disk_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Some tensors share memory")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    with pytest.raises(RuntimeError, match="share memory"):
        run_training(make_trainer(MoTForCausalLM(tiny_config()), tmp_path, max_steps=1), None)


def test_a_connection_that_breaks_while_pushing_is_not_about_the_text(tmp_path: Path) -> None:
    def push_to_hub() -> None:
        raise ConnectionError("no route")

    trainer = make_trainer(MoTForCausalLM(tiny_config()), tmp_path)
    with pytest.raises(ConnectionError, match="no route"), explain_failures(trainer.args):
        push_to_hub()


class TestDiskSpace:
    """Sizes of a checkpoint of a model of 30 000 parameters and more, by hand."""

    @pytest.fixture
    def leave(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
        """Sets how many bytes are free."""
        total = shutil.disk_usage("/")

        def leave(free: int) -> None:
            monkeypatch.setattr(shutil, "disk_usage", lambda path: total._replace(free=free))

        return leave

    def run(self, folder: Path, **changes: Any) -> int:
        model = changes.pop("model", None) or MoTForCausalLM(tiny_config())
        optimizer = changes.pop("optimizer", None)
        trainer = make_trainer(model, folder, [DiskSpaceCheck()], **(SAVING | {"max_steps": 1} | changes))
        trainer.optimizer = optimizer
        return trainer.train().global_step

    @pytest.mark.parametrize(
        ("changes", "copies"),
        [({}, 3), ({"save_only_model": True}, 1), ({"optim": "sgd"}, 1), ({"optim": "adafactor"}, 1)],
    )
    def test_a_run_whose_checkpoint_does_not_fit_is_not_started(
        self, changes: dict[str, Any], copies: int, tmp_path: Path, leave: Callable[[int], None]
    ) -> None:
        model = MoTForCausalLM(tiny_config())
        size = copies * sum(parameter.numel() * 4 for parameter in model.parameters())
        leave(size - 1)
        with pytest.raises(OSError, match=r"A checkpoint takes at least .* GB free") as caught:
            self.run(tmp_path / "new", model=model, **changes)
        assert caught.value.errno == errno.ENOSPC
        leave(size)
        assert self.run(tmp_path / "new", model=model, **changes) == 1

    def test_adapters_need_no_room_for_the_model(self, tmp_path: Path, leave: Callable[[int], None]) -> None:
        model = add_lora(MoTForCausalLM(tiny_config()), rank=1)
        trained = sum(parameter.numel() * 4 for parameter in model.parameters() if parameter.requires_grad)
        assert 3 * trained < sum(parameter.numel() * 4 for parameter in model.parameters())
        leave(3 * trained)
        assert self.run(tmp_path, model=model) == 1
        saved = tmp_path / "checkpoint-1"
        assert (saved / "adapter_model.safetensors").stat().st_size >= trained
        assert (saved / "optimizer.pt").stat().st_size >= 2 * trained
        leave(3 * trained - 1)
        with pytest.raises(OSError, match="at least"):
            self.run(tmp_path / "new", model=model)

    def test_frozen_parameters_have_no_moments(self, tmp_path: Path, leave: Callable[[int], None]) -> None:
        model = MoTForCausalLM(tiny_config())
        model.model.embed_tokens.requires_grad_(False)
        total = sum(parameter.numel() * 4 for parameter in model.parameters())
        leave(3 * total - 2 * model.model.embed_tokens.weight.numel() * 4)
        assert self.run(tmp_path, model=model) == 1

    @pytest.mark.skipif(
        "ep_size" not in DistributedConfig.__dataclass_fields__, reason="this transformers has another parallelism"
    )
    @pytest.mark.parametrize(
        "sizes", [{"fsdp_size": 4}, {"tp_size": 2, "fsdp_size": 2}, {"fsdp_size": 4, "ep_size": 4}]
    )
    def test_all_parts_of_a_spread_model_count(
        self, sizes: dict[str, int], tmp_path: Path, leave: Callable[[int], None]
    ) -> None:
        size = sum(parameter.numel() * 4 for parameter in MoTForCausalLM(tiny_config()).parameters())
        state = TrainerState(max_steps=1)
        args = TrainingArguments(str(tmp_path), use_cpu=True, save_strategy="steps")
        with pretend(4):
            model = spread(MoTForCausalLM, tiny_config(), **sizes)
            check = partial(
                DiskSpaceCheck().on_train_begin,
                args,
                state,
                TrainerControl(),
                model,
                torch.optim.AdamW(model.parameters()),
            )
            leave(3 * size)
            check()
            leave(3 * size - 1)
            with pytest.raises(OSError, match="A checkpoint takes at least"):
                check()
            # What accelerate divides may be on a disk of each machine, of which two processes are here.
            cast(Any, model)._is_distributed_loading_by_transformers = False
            with patch.dict(os.environ, {"LOCAL_WORLD_SIZE": "2"}):
                leave(int(1.6 * size))
                check()
                leave(int(1.4 * size))
                with pytest.raises(OSError, match="A checkpoint takes at least"):
                    check()

    def test_a_half_written_checkpoint_is_written_over(self, tmp_path: Path, leave: Callable[[int], None]) -> None:
        rest = tmp_path / "checkpoint-1" / "optimizer.pt"
        rest.parent.mkdir()
        rest.write_bytes(bytes(10**6))
        leave(0)
        assert self.run(tmp_path) == 1

    def test_a_run_that_saves_nothing_is_started(self, tmp_path: Path, leave: Callable[[int], None]) -> None:
        leave(0)
        assert self.run(tmp_path, save_strategy="no") == 1

    def test_the_error_is_not_explained_twice(self, tmp_path: Path, leave: Callable[[int], None]) -> None:
        leave(0)
        trainer = make_trainer(MoTForCausalLM(tiny_config()), tmp_path, [DiskSpaceCheck()], **SAVING)
        with pytest.raises(OSError, match="at least") as caught:
            run_training(trainer, None)
        assert "could not be written" not in str(caught.value)
