"""Commands that write a model where there is one, killed at random moments: nothing is lost.

`MOT_HF_KILLS=12 MOT_HF_KILL_SEED=7 pytest tests/toolkit/test_kills.py` tries other moments, and more of them. Moments
that are rarely met are looked for step by step in the tests of what the commands are made of.
"""

import logging
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from mot_hf import MoTForCausalLM
from mot_hf.conversion.export import export_qwen3_moe
from mot_hf.conversion.statistics import calibrate_folder
from mot_hf.storage.checkpoint_files import CheckpointReader
from mot_hf.storage.locking import LOCK_NAME
from tests.conversion.test_upcycle import convert, make_batches, save_dense
from tests.storage.test_checkpoint_writer import add_others, contents, is_same, load

logger = logging.getLogger(__name__)

NUM_KILLS = int(os.environ.get("MOT_HF_KILLS", "3"))
SEED = int(os.environ.get("MOT_HF_KILL_SEED", "0"))


# A copy of this process would have its locks and its memory, but none of its threads.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])


@pytest.fixture(scope="module")
def dense_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dense(tmp_path_factory.mktemp("dense"), hidden_size=64)


@pytest.fixture(scope="module")
def model_dir(dense_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mot") / "model"
    convert(dense_dir, folder, seed=7)
    return folder


def export(model_dir: Path, output: Path) -> None:
    export_qwen3_moe(model_dir, output, force=True, allow_untuned=True, max_shard_size=100_000)


def upcycle(dense_dir: Path, output: Path) -> None:
    convert(dense_dir, output, force=True)


def calibrate(output: Path) -> None:
    calibrate_folder(output, lambda model, tokenizer: make_batches(20, seed=5))


def start(work: Callable[[Path], None], output: Path) -> BaseProcess:
    process = PROCESSES.Process(target=run_on_one_thread, args=(work, output))
    process.start()
    return process


def run_on_one_thread(work: Callable[[Path], None], output: Path) -> None:
    torch.set_num_threads(1)
    work(output)


def list_names(output: Path) -> set[str]:
    """What lies beside and in a folder, but for the lock."""
    return {*os.listdir(output.parent), *(os.listdir(output) if output.is_dir() else ())} - {LOCK_NAME}


def wait_for_files(output: Path, process: BaseProcess) -> None:
    """Wait until a process begins to write, or ends."""
    before = list_names(output)
    while list_names(output) == before and process.is_alive():
        time.sleep(1e-4)


def measure(work: Callable[[Path], None], output: Path) -> tuple[float, float]:
    """How many seconds a process takes for work, and for the part of it from the first file on."""
    begin = time.perf_counter()
    process = start(work, output)
    wait_for_files(output, process)
    first_file = time.perf_counter()
    process.join()
    end = time.perf_counter()
    assert process.exitcode == 0
    return end - begin, end - first_file


def kill(process: BaseProcess) -> bool:
    """Kill a process, and tell whether it was still at work."""
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.slow
@pytest.mark.parametrize("command", ["export", "upcycle", "calibrate", "calibrate shards"])
def test_a_command_that_is_killed_loses_nothing(
    command: str,
    dense_dir: Path,
    model_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    works = {"export": partial(export, model_dir), "upcycle": partial(upcycle, dense_dir), "calibrate": calibrate}
    work = works[command.split()[0]]
    old_dir, done = tmp_path / "old", tmp_path / "done"
    shutil.copytree(model_dir, old_dir)
    if "shards" in command:
        split(old_dir)
    others = add_others(old_dir)
    shutil.copytree(old_dir, done, symlinks=True)
    shutil.copytree(old_dir, tmp_path / "measured", symlinks=True)
    work(done)
    duration, writing = measure(work, tmp_path / "measured")
    models = {"old": load(old_dir), "new": load(done)}
    assert not is_same(models["old"], models["new"])

    chance, found, num_killed, num_leftovers = random.Random(SEED), [], 0, 0
    for trial in range(8 * NUM_KILLS):
        output = tmp_path / str(trial) / "output"
        shutil.copytree(old_dir, output, symlinks=True)
        process = start(work, output)
        if trial % 2:
            time.sleep(chance.uniform(0, duration))
        else:
            wait_for_files(output, process)
            time.sleep(chance.uniform(0, writing))
        was_at_work = kill(process)
        num_killed += was_at_work
        if not was_at_work:  # it is faster than it was when measured
            duration, writing = duration / 2, writing / 2
        found += [name for name, model in models.items() if is_same(load(output), model)]
        assert len(found) == trial + 1
        assert all((output / name).is_file() for name in others if "/" not in name)
        leftovers = [path for path in output.parent.iterdir() if path != output]
        leftovers += [path for path in output.iterdir() if re.search("calibrat|index.json.new", path.name)]
        num_leftovers += len(leftovers)
        caplog.clear()
        work(output)
        assert all(path.name in caplog.text for path in leftovers)
        assert is_same(load(output), models["new"])
        assert contents(output).items() >= others.items()
        assert contents(output).keys() == contents(done).keys()
        if num_killed == NUM_KILLS:
            break
    figures = num_killed, len(found), num_leftovers, found.count("new")
    logger.info("%s: %d of %d killed, %d leftovers, %d new models", command, *figures)
    assert num_killed == NUM_KILLS


def split(folder: Path) -> None:
    """Cut the weights of a model into several files."""
    model = MoTForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(CheckpointReader(folder).names) == len(model.state_dict())
