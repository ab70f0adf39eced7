"""Training that is killed at random moments and begun again: `FOLDER NUMBER SEED`.

FOLDER holds texts. Each run goes on from a complete one of half the steps. The script's processes are forks of this
one, which has the libraries in memory. Prints a line of JSON for each kill: what stood under the final name, and how
the next command ended.
"""

import gc
import hashlib
import json
import logging
import os
import random
import runpy
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Trainer

import mot_hf.reporting.card  # imported by the first run otherwise, in each of them
import mot_hf.training.run
from mot_hf.storage.checkpoints import list_checkpoints
from mot_hf.training import find_damage, find_last_checkpoint
from tests.scripts.running import REPOSITORY

TINY = ["--hidden_size", "32", "--num_attention_heads", "2", "--intermediate_size", "64", "--num_hidden_layers", "2"]
SHORT = ["--warmup_steps", "1", "--vocab_size", "300", "--block_length", "16", "--logging_steps", "1"]
SAVING = ["--save_steps", "2", "--save_only_model", "false", "--eval_strategy", "no", "--report_to", "none"]
RESUME = ["--resume_from_checkpoint", "true"]


def arguments(run: str, max_steps: int) -> list[str]:
    recipe = str(REPOSITORY / "mot_hf" / "recipes" / "small_clm.yaml")
    steps = ["--max_steps", str(max_steps), "--lr_scheduler_type", "constant"]
    return [recipe, "--output_dir", run, "--source", "texts", *TINY, *SHORT, *SAVING, *steps]


def marked(function: Callable[..., Any], channel: int, mark: bytes) -> Callable[..., Any]:
    """A function that says when it begins."""

    def run(*args: Any, **kwargs: Any) -> Any:
        os.write(channel, mark)
        return function(*args, **kwargs)

    return run


def start(command: list[str], log: Path) -> tuple[int, int]:
    """Start the script; returns its process and a channel, which gets a letter where it trains, and where it saves."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        logging.lastResort = logging.StreamHandler()
        sys.stderr = os.fdopen(2, "w", buffering=1)
        code = 1
        try:
            Trainer.train = marked(Trainer.train, writing, b"t")
            Trainer._save_checkpoint = marked(Trainer._save_checkpoint, writing, b"c")
            mot_hf.training.run.save_run = marked(mot_hf.training.run.save_run, writing, b"s")
            sys.argv = ["train_clm.py", *command]
            runpy.run_path(str(REPOSITORY / "scripts" / "train_clm.py"), run_name="__main__")
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    return process, reading


def finish(command: list[str], log: Path) -> tuple[int, dict[bytes, float]]:
    """Run the script to its end; returns its status and, by mark, how long it went on from there."""
    process, channel = start(command, log)
    marks = {}
    while mark := os.read(channel, 1):
        marks[mark] = time.monotonic()
    os.close(channel)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return status, {mark: time.monotonic() - begun for mark, begun in marks.items()}


def kill(command: list[str], log: Path, mark: bytes, delay: float) -> bool:
    """Run the script and kill it some time after a mark; returns whether it was still running."""
    process, channel = start(command, log)
    while os.read(channel, 1) not in (mark, b""):
        pass
    select.select([], [], [], delay)
    os.kill(process, signal.SIGKILL)
    os.close(channel)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def look(run: Path, models: dict[str, str]) -> str:
    """Which model is found under the final name."""
    if not (run / "model.safetensors").exists():
        return "none"
    AutoModelForCausalLM.from_pretrained(run)
    return models.get(digest(run), "another one")


def losses(run: Path) -> list[dict[str, float]]:
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [{name: value for name, value in entry.items() if "loss" in name or name == "step"} for entry in log]


def main(folder: Path, number: int, seed: int) -> None:
    """Kill and begin again."""
    os.chdir(folder)
    chance = random.Random(seed)
    assert finish(arguments("half", 4), folder / "half.log")[0] == 0
    for name in ("again", "whole"):  # the first run is slower than the others
        shutil.copytree("half", name)
        status, lasted = finish([*arguments(name, 8), *RESUME], folder / f"{name}.log")
        assert status == 0, (folder / f"{name}.log").read_text()
    models = {digest(folder / "half"): "old", digest(folder / "whole"): "new"}
    for turn in range(number):
        # While it trains, while it saves a checkpoint, while it saves the model, and until it ends.
        mark, longest = (
            (b"t", lasted[b"t"] - lasted[b"s"]),
            (b"c", lasted[b"c"] - lasted[b"s"]),
            (b"s", 0.1 * lasted[b"s"]),
            (b"s", lasted[b"s"]),
        )[turn % 4]
        delay = chance.uniform(0, longest)
        run = folder / f"run{turn}"
        shutil.copytree("half", run)
        command, log = [*arguments(run.name, 8), *RESUME], folder / f"run{turn}.log"
        outcome = {"after": mark.decode(), "delay": round(delay, 3), "is_killed": kill(command, log, mark, delay)}
        outcome["model"] = look(run, models)
        outcome["left"] = sorted(path.name for path in run.glob("_*"))
        outcome["half_written"] = [path.name for path in list_checkpoints(run) if find_damage(path)]
        outcome["last"] = Path(find_last_checkpoint(run) or "").name
        outcome["status"], _ = finish(command, log)
        outcome["log"] = [line for line in log.read_text().splitlines() if str(run.name) in line]
        outcome["model_afterwards"] = look(run, models)
        outcome["losses_agree"] = losses(run) == losses(folder / "whole")
        outcome["left_afterwards"] = sorted(path.name for path in run.glob("_*"))
        outcome["damaged_afterwards"] = [path.name for path in list_checkpoints(run) if find_damage(path)]
        sys.stdout.write(json.dumps(outcome) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # each run of a `Trainer` looks through all that is in memory
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]), int(sys.argv[3]))
