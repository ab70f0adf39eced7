"""Two runs in one folder: the second one ends at once, and touches nothing."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from transformers import TrainingArguments

from mot_hf import MoTForCausalLM
from mot_hf.storage.locking import LOCK_NAME
from mot_hf.training import (
    CorpusArguments,
    ModelArguments,
    finetune_classification,
    run_training,
    train_language_model,
)
from mot_hf.training.run import lock_run
from tests.models import tiny_config
from tests.training.trainers import make_trainer

HOLD = """
import filelock, sys
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Path]:
    """A folder that another process is writing to."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / LOCK_NAME)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield tmp_path
        process.communicate("")


def train(folder: Path) -> None:
    train_language_model(ModelArguments(), CorpusArguments(), TrainingArguments(str(folder)), masked=False)


def finetune(folder: Path) -> None:
    rows = Dataset.from_dict({"text": ["a"], "label": [0]})
    finetune_classification("none", DatasetDict(train=rows, validation=rows), TrainingArguments(str(folder)))


def run(folder: Path) -> None:
    run_training(make_trainer(MoTForCausalLM(tiny_config()), folder, max_steps=1), None)


@pytest.mark.parametrize("start", [train, finetune, run])
def test_a_second_run_ends_with_a_clear_error(start: Callable[[Path], None], held: Path) -> None:
    rest = held / "_unfinished"
    rest.mkdir()
    with pytest.raises(OSError, match=f"The folder '{held}' is in use: another run or command is writing to it"):
        start(held)
    # The other one's.
    assert sorted(path.name for path in held.iterdir()) == [LOCK_NAME, "_unfinished"]


def test_the_folder_is_free_once_a_run_has_ended(tmp_path: Path) -> None:
    for _ in range(2):
        run(tmp_path)
        assert not (tmp_path / LOCK_NAME).exists()


def test_other_processes_of_a_run_do_not_ask(held: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "process_index", property(lambda self: 1))
    with lock_run(TrainingArguments(str(held))):
        pass
