"""Two real processes, joined by accelerate with the configurations of scripts/accelerate, against one."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM, TrainingArguments

from mot_hf.training import CorpusArguments, ModelArguments, find_damage, parse_arguments, train_language_model
from tests.models import companions_of
from tests.scripts.running import write_texts

REPOSITORY = Path(__file__).parents[2]
KINDS = [
    pytest.param("ddp", "MULTI_CPU", id="ddp"),
    pytest.param("fsdp2", "FSDP", id="fsdp2"),
    pytest.param(
        "deepspeed_zero3",
        "DEEPSPEED",
        id="deepspeed_zero3",
        marks=pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
    ),
]

pytestmark = pytest.mark.slow


def command_line(folder: Path, per_device_rows: int, **changes: Any) -> list[str]:
    """Arguments of a small run with groups of 4 rows: 6 steps, saved and evaluated every 3."""
    arguments: dict[str, Any] = {
        "output_dir": folder,
        "source": folder.parent / "texts",
        "vocab_size": 300,
        "block_length": 16,
        "max_eval_rows": 32,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "group_size": 4,
        "num_experts": 8,
        "per_device_train_batch_size": per_device_rows,
        "per_device_eval_batch_size": 8,
        "train_sampling_strategy": "sequential",
        "dataloader_drop_last": True,
        "dataloader_pin_memory": False,
        "max_steps": 6,
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "logging_steps": 1,
        "learning_rate": 0.01,
        "ddp_broadcast_buffers": False,
        "ddp_find_unused_parameters": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return [word for name, value in (arguments | changes).items() for word in (f"--{name}", str(value))]


def launch(kind: str, folder: Path, *runs: list[str]) -> str:
    """Let two processes do several runs, one after the other; returns what they printed."""
    environment = {
        **os.environ,
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(REPOSITORY / "scripts" / "accelerate" / f"{kind}.yaml")]
    command += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    configured = ["--accelerator_config", '{"use_configured_state": true}']
    command += [str(Path(__file__).with_name("distributed_worker.py")), json.dumps([run + configured for run in runs])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-20_000:]
    return done.stdout


def log_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def values_of(folder: Path) -> dict[str, list[float]]:
    """Losses and what the monitor logged, by name."""
    log = [entry for entry in log_of(folder) if "train_runtime" not in entry]
    names = {name for entry in log for name in entry if "loss" in name or name.startswith("mixing/")}
    return {name: [entry[name] for entry in log if name in entry] for name in sorted(names)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts, and a run of one process on batches as large as those of two processes together."""
    folder = tmp_path_factory.mktemp("distributed")
    write_texts(folder / "texts", num_words=200)
    classes = (ModelArguments, CorpusArguments, TrainingArguments)
    train_language_model(*parse_arguments(classes, command_line(folder / "one", 16)), masked=False)
    return folder


@pytest.mark.parametrize(("kind", "distributed_type"), KINDS)
def test_two_processes_are_one_with_the_same_groups(folder: Path, kind: str, distributed_type: str) -> None:
    run, resumed, broadcast = (folder / name for name in (kind, f"{kind}_resumed", f"{kind}_broadcast"))
    folders: dict[Path, list[str]] = {run: []}
    # An older transformers wants to load the optimizer's state onto a device 'cpu:0', which torch refuses.
    if kind != "ddp" or Version(transformers.__version__) >= Version("5.23"):
        folders[resumed] = ["--resume_from_checkpoint", str(run / "checkpoint-3")]
    if kind == "ddp":
        folders[broadcast] = ["--ddp_broadcast_buffers", "true"]
    runs = [command_line(path, 8) + more for path, more in folders.items()]
    assert launch(kind, folder, *runs).count(f"distributed by {distributed_type}") >= len(runs)
    one, two = values_of(folder / "one"), values_of(run)
    assert one.keys() == two.keys()
    assert len(one["loss"]) == 6
    assert len(one["mixing/entropy/layers_1"]) == 6
    assert len(one["eval_token_loss"]) == 2
    for name, expected in one.items():
        assert two[name] == pytest.approx(expected, rel=1e-3), name

    # Every process has the same statistics when it saves, and they are those of one process.
    expected = companions_of(AutoModelForCausalLM.from_pretrained(folder / "one" / "checkpoint-3"))
    first, second = (torch.load(run / f"statistics-3-{rank}.pt") for rank in range(2))
    for (name, value), mine, other in zip(expected.items(), first.values(), second.values(), strict=True):
        assert torch.equal(mine, other), name
        torch.testing.assert_close(mine, value, rtol=1e-3, atol=1e-5)
    saved, whole = (AutoModelForCausalLM.from_pretrained(folder / name).state_dict() for name in (kind, "one"))
    for name, value in whole.items():
        torch.testing.assert_close(saved[name], value, rtol=5e-2, atol=2e-3, msg=lambda text, name=name: name + text)

    # A run that goes on from its first checkpoint goes on identically.
    assert find_damage(run / "checkpoint-6") is None
    for name, expected in two.items() if resumed in folders else ():
        assert values_of(resumed)[name] == pytest.approx(expected, rel=1e-6), name
    assert resumed not in folders or find_damage(resumed / "checkpoint-6") is None

    # The first process hands its statistics to all if DDP broadcasts them.
    if broadcast in folders:
        first, second = (torch.load(broadcast / f"statistics-6-{rank}.pt") for rank in range(2))
        assert all(torch.equal(value, second[name]) for name, value in first.items())
        assert values_of(broadcast)["loss"] == pytest.approx(one["loss"], rel=1e-3)
