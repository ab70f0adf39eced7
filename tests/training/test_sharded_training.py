"""Training by the stock `Trainer` with a model that is spread over two real processes, against one process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.distributed import DistributedConfig

from mot_hf import MoTForCausalLM
from mot_hf.conversion.export import export_qwen3_moe
from mot_hf.storage.checkpoints import find_damage, list_checkpoints
from mot_hf.training import CorpusArguments, MethodArguments, ModelArguments, parse_arguments, train_language_model
from mot_hf.training.parallelism import spread_model
from tests.processes import REPOSITORY, launch, make_environment, start, torchrun
from tests.scripts.running import write_texts
from tests.training.test_distributed import command_line as distributed_command_line

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("transformers.distributed.expert_parallel") is None, reason="older transformers"),
]

WORKER = Path(__file__).with_name("distributed_worker.py")
LAYOUTS = {
    "tp": ("--tp_size", "2"),
    "fsdp": ("--fsdp_size", "2"),
    "ep": ("--fsdp_size", "2", "--ep_size", "2"),
    "tp_ep": ("--tp_size", "2", "--ep_size", "2"),
}
ROUNDED = ("--bf16", "true", "--gradient_checkpointing", "true", "--max_steps", "4", "--save_strategy", "no")
RESUMED = ("--resume_from_checkpoint", "true")


def command_line(folder: Path, per_device_rows: int, **changes: Any) -> list[str]:
    """Arguments of a small run with groups of 4 rows: 12 steps of 16 rows, saved and evaluated every 6."""
    own = {"max_steps": 12, "save_steps": 6, "eval_steps": 6, "learning_rate": 0.003, "use_cpu": True}
    return distributed_command_line(folder, per_device_rows, **own | changes)


def train_by_one(run: Path, *arguments: str) -> None:
    """Run this process on batches as large as those of two processes together."""
    classes = (ModelArguments, CorpusArguments, TrainingArguments, MethodArguments)
    train_language_model(*parse_arguments(classes, [*command_line(run, 16), *arguments]), masked=False)


def of_two(run: Path, layout: str, *arguments: str) -> list[str]:
    """Arguments of two processes for the same steps; with tensor parallelism both have every row."""
    return [*command_line(run, 16 if "tp" in layout else 8), *LAYOUTS[layout], *arguments]


def train_by_two(*runs: list[str]) -> None:
    """Let two processes do several runs, one after the other."""
    # The worker has joined them already.
    configured = ["--accelerator_config", '{"use_configured_state": true}']
    launch(WORKER, 2, json.dumps([[*run, *configured] for run in runs]), timeout=600)


def values_of(folder: Path) -> dict[str, list[float]]:
    """Losses and what the monitor logged, by name."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    log = [entry for entry in log if "train_runtime" not in entry]
    names = {name for entry in log for name in entry if "loss" in name or name.startswith("mixing/")}
    return {name: [entry[name] for entry in log if name in entry] for name in sorted(names)}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def assert_same_weights(folder: Path, other: Path, atol: float) -> None:
    expected, weights = weights_of(folder), weights_of(other)
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-2, atol=atol, msg=lambda text, name=name: name + text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts, runs of one process and of two, and those of two that lost their end and went on."""
    folder = tmp_path_factory.mktemp("sharded")
    write_texts(folder / "texts", num_words=200)
    train_by_one(folder / "one")
    train_by_one(folder / "one_rounded", *ROUNDED)
    rounded = [of_two(folder / f"{layout}_rounded", layout, *ROUNDED) for layout in ("ep", "tp_ep")]
    train_by_two(*(of_two(folder / layout, layout) for layout in LAYOUTS), *rounded)
    resumed = [of_two(copy_half(folder / layout, "resumed"), layout, *RESUMED) for layout in LAYOUTS]
    train_by_two(*resumed, of_two(copy_half(folder / "ep", "moved"), "tp", *RESUMED))
    return folder


def copy_half(run: Path, suffix: str) -> Path:
    """Copy a run without its last checkpoint."""
    copy = run.with_name(f"{run.name}_{suffix}")
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoint-12"))
    return copy


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_train_as_one(folder: Path, layout: str) -> None:
    run = folder / layout
    one, two = values_of(folder / "one"), values_of(run)
    assert one.keys() == two.keys()
    assert len(one["loss"]) == 12
    assert len(one["eval_token_loss"]) == 2
    for name, expected in one.items():
        assert two[name] == pytest.approx(expected, rel=1e-3), name
    assert_same_weights(folder / "one", run, atol=2e-3)
    assert not list(run.glob("_*"))
    assert find_damage(run / "checkpoint-12") is None
    first, second = (torch.load(run / f"statistics-6-{rank}.pt") for rank in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())

    # One process loads and exports what two have trained.
    export_qwen3_moe(run, folder / f"{layout}-exported", allow_untuned=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_goes_on_as_if_nothing_had_happened(folder: Path, layout: str) -> None:
    run, resumed = folder / layout, folder / f"{layout}_resumed"
    for name, expected in values_of(run).items():
        assert values_of(resumed)[name] == pytest.approx(expected, rel=1e-6), name
    assert_same_weights(run / "checkpoint-12", resumed / "checkpoint-12", atol=1e-6)


@pytest.mark.parametrize("layout", ["ep", "tp_ep"])
def test_checkpointed_and_rounded_passes_train_as_in_one_process(folder: Path, layout: str) -> None:
    one, two = (values_of(folder / f"{name}_rounded") for name in ("one", layout))
    assert one.keys() == two.keys()
    plain = values_of(folder / "one")["loss"][0]
    assert one["loss"][0] != plain
    for name, expected in one.items():
        assert two[name] == pytest.approx(expected, rel=2e-2), name


def test_a_run_goes_on_in_another_number_of_processes(folder: Path) -> None:
    run, one = folder / "ep_moved", values_of(folder / "one")
    for go_on in (None, partial(train_by_one, run, *RESUMED)):
        if go_on:
            shutil.rmtree(run / "checkpoint-12")
            go_on()
        for name, expected in one.items():
            assert values_of(run)[name] == pytest.approx(expected, rel=1e-3), name
        assert_same_weights(folder / "one", run, atol=2e-3)


def test_a_run_whose_processes_are_killed_goes_on_as_if_nothing_had_happened(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "killed"
    command = [REPOSITORY / "scripts" / "train_clm.py", *of_two(run, "ep"), "--source", str(folder / "texts")]
    # One process, after the first checkpoint: the launcher ends the other.
    with launched(*command) as (launcher, workers):
        assert launcher.stdout is not None
        losses = (line for line in launcher.stdout if "'loss'" in line)
        assert len(list(islice(losses, 7))) == 7
        os.kill(workers()[1], signal.SIGKILL)
        assert launcher.wait(timeout=120) != 0
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-6"]

    # Then all of them at once, while they save.
    with launched(*command, *RESUMED) as (launcher, workers):
        wait_for(run / "checkpoint-12", launcher)
        for process in [launcher.pid, *workers()]:
            os.kill(process, signal.SIGKILL)
    assert not (run / "trainer_state.json").exists()
    shutil.copytree(run, tmp_path / "moved")

    start(*torchrun(2), *command, *RESUMED)
    for name, expected in values_of(folder / "ep").items():
        assert values_of(run)[name] == pytest.approx(expected, rel=1e-6), name
    assert_same_weights(folder / "ep" / "checkpoint-12", run / "checkpoint-12", atol=1e-6)
    assert not list(run.glob("_*"))

    train_by_one(tmp_path / "moved", "--source", str(folder / "texts"), *RESUMED)
    for name, expected in values_of(folder / "one").items():
        assert values_of(tmp_path / "moved")[name] == pytest.approx(expected, rel=1e-3), name


@contextmanager
def launched(*command: str | Path) -> Iterator[tuple[subprocess.Popen[str], Callable[[], list[int]]]]:
    """torchrun with two processes, and what lists these; ends them all."""
    with tempfile.TemporaryFile() as errors:
        launcher = subprocess.Popen(
            [sys.executable, *torchrun(2), *map(str, command)],
            env=make_environment() | {"PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        children: list[int] = []

        def workers() -> list[int]:
            children[:] = [process.pid for process in psutil.Process(launcher.pid).children()]
            return children

        try:
            yield launcher, workers
        finally:
            for process in children:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            launcher.kill()
            launcher.communicate()


def wait_for(folder: Path, launcher: subprocess.Popen[str]) -> None:
    while not folder.exists():
        assert launcher.poll() is None
        time.sleep(0.005)


def test_a_whole_optimizer_is_not_taken_for_parts(folder: Path) -> None:
    with pytest.raises(ValueError, match="whose model was whole in every process: resume it without `tp_size`"):
        spread_model(
            MoTForCausalLM,
            cast(Any, None),
            DistributedConfig(),
            cast(Any, None),
            str(folder / "one" / "checkpoint-6"),
        )
