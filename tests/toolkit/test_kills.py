"""Commands that write a model where there is one, killed at random moments: nothing is lost.

`MOT_HF_KILLS=12 MOT_HF_KILL_SEED=7 pytest tests/toolkit/test_kills.py` tries other moments, and more of them. Moments
that are rarely met are looked for step by step in the tests of what the commands are made of.
"""

import logging
import os
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tqdm.auto import tqdm

from mot_hf import MoTForCausalLM
from mot_hf.conversion.checkpoint_files import CheckpointReader
from mot_hf.conversion.export import export_qwen3_moe
from mot_hf.conversion.statistics import calibrate_folder
from mot_hf.locking import LOCK_NAME
from tests.toolkit.test_checkpoint_writer import add_others, contents, is_same, load
from tests.toolkit.test_upcycle import convert, make_batches, save_dense

logger = logging.getLogger(__name__)

NUM_KILLS = int(os.environ.get("MOT_HF_KILLS", "3"))
SEED = int(os.environ.get("MOT_HF_KILL_SEED", "0"))


@pytest.fixture(autouse=True)
def nothing_shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads of this process are not there in those that are killed, and locks are not to be shared with them."""
    num_threads, lock = torch.get_num_threads(), tqdm.get_lock()
    monkeypatch.setattr(tqdm, "monitor_interval", 0)
    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
    tqdm.set_lock(lock)


@pytest.fixture(scope="module")
def dense_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dense(tmp_path_factory.mktemp("dense"), hidden_size=64)


@pytest.fixture(scope="module")
def model_dir(dense_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mot") / "model"
    convert(dense_dir, folder, seed=7)
    return folder


def start(work: Callable[[], object]) -> int:
    process = os.fork()
    if process == 0:
        try:
            work()
        finally:
            os._exit(0)
    return process


def list_names(output: Path) -> set[str]:
    """What lies beside and in a folder, but for the lock."""
    return {*os.listdir(output.parent), *(os.listdir(output) if output.is_dir() else ())} - {LOCK_NAME}


def wait_for_files(output: Path, process: int) -> None:
    """Wait until a process begins to write, or ends."""
    before = list_names(output)
    while list_names(output) == before and not os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(1e-4)


def measure(output: Path, work: Callable[[], object]) -> tuple[float, float]:
    """How many seconds a process takes for work, and for the part of it from the first file on."""
    begin = time.perf_counter()
    process = start(work)
    wait_for_files(output, process)
    first_file = time.perf_counter()
    os.waitpid(process, 0)
    end = time.perf_counter()
    return end - begin, end - first_file


def kill(process: int) -> bool:
    """Kill a process, and tell whether it was still at work."""
    os.kill(process, signal.SIGKILL)
    return os.waitpid(process, 0)[1] == signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("command", ["export", "upcycle", "calibrate", "calibrate shards"])
def test_a_command_that_is_killed_loses_nothing(
    command: str,
    dense_dir: Path,
    model_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    commands: dict[str, Callable[[Path], object]] = {
        "export": lambda output: export_qwen3_moe(
            model_dir, output, force=True, allow_untuned=True, max_shard_size=100_000
        ),
        "upcycle": lambda output: convert(dense_dir, output, force=True),
        "calibrate": lambda output: calibrate_folder(output, lambda model, tokenizer: make_batches(20, seed=5)),
    }
    work = commands[command.split()[0]]
    old_dir, done = tmp_path / "old", tmp_path / "done"
    shutil.copytree(model_dir, old_dir)
    if "shards" in command:
        split(old_dir)
    others = add_others(old_dir)
    shutil.copytree(old_dir, done, symlinks=True)
    shutil.copytree(old_dir, tmp_path / "measured", symlinks=True)
    work(done)
    duration, writing = measure(tmp_path / "measured", lambda: work(tmp_path / "measured"))
    models = {"old": load(old_dir), "new": load(done)}
    assert not is_same(models["old"], models["new"])

    chance, found, num_killed, num_leftovers = random.Random(SEED), [], 0, 0
    for trial in range(8 * NUM_KILLS):
        output = tmp_path / str(trial) / "output"
        shutil.copytree(old_dir, output, symlinks=True)
        process = start(lambda output=output: work(output))
        if trial % 2:
            time.sleep(chance.uniform(0, duration))
        else:
            wait_for_files(output, process)
            time.sleep(chance.uniform(0, writing))
        num_killed += kill(process)
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
