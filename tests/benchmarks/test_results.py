"""What benchmarks share when they read rows and write results."""

import json
import re
import sys
from dataclasses import dataclass, field
from datetime import date
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from mot_hf.data.blocks import make_blocks
from mot_hf.data.corpus import load_corpus, make_batches
from mot_hf.data.default_corpus import default_corpus_info
from mot_hf.data.tokenizer import train_tokenizer
from scripts.benchmarks.measuring import describe_machine
from scripts.benchmarks.results import describe_arguments, describe_command, write_json, write_results
from scripts.benchmarks.rows import describe_corpus, load_rows
from tests.scripts.running import REPOSITORY


@dataclass
class Arguments:
    """Arguments, some of them paths, and what is not an argument."""

    output_dir: str = "/home/someone/results"
    models: list[str] = field(default_factory=lambda: ["/home/someone/model"])
    max_rows: int = 3
    from_recipe: frozenset[str] = field(default=frozenset(), init=False)


@dataclass
class Sizes:
    """More arguments."""

    source: str = "/home/someone/text"
    hidden_size: int = 8


def test_arguments_are_described_without_the_paths_of_a_machine() -> None:
    assert describe_arguments(Arguments(), Sizes()) == {"max_rows": 3, "hidden_size": 8}


@pytest.mark.parametrize(
    ("module", "words", "command"),
    [
        (
            "scripts.benchmarks.modes.run",
            ["--num_rounds", "5"],
            "python -m scripts.benchmarks.modes.run --num_rounds 5",
        ),
        (None, ["--models", "runs/a", "/home/me/b"], "python scripts/modes.py --models runs/a b"),
        (None, ["--source=/home/me/*.py", "a b"], "python scripts/modes.py '--source=*.py' 'a b'"),
    ],
)
def test_a_command_is_described_without_the_folders_of_a_machine(
    module: str | None, words: list[str], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ModuleSpec(module, None) if module else None
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.setattr(sys, "argv", ["scripts/modes.py", *words])
    assert describe_command() == command


def test_numbers_table_and_picture_are_written_beside_each_other(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "results"
    write_results(folder, "topic", {"results": [1]}, "| a |\n", Figure())
    record = json.loads((folder / "topic.json").read_text())
    assert record.pop("date") == date.today().isoformat()
    if (REPOSITORY / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?", record.pop("commit"))
    assert record.pop("command") == describe_command()
    assert record == {"results": [1]}
    assert (folder / "topic.md").read_text() == "| a |\n"
    assert (folder / "topic.png").read_bytes().startswith(b"\x89PNG")
    write_results(tmp_path, "numbers", {})
    assert {path.name for path in tmp_path.iterdir()} == {"new", "numbers.json"}


def test_numbers_that_cannot_be_written_leave_those_before(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"results": [1]})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"results": [1, 2, {3}]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"results": [1]}


def test_a_corpus_is_described_without_its_folder(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("words")
    assert describe_corpus(str(tmp_path / "text.txt")) == "text.txt"
    info = default_corpus_info()
    described = describe_corpus(None)
    assert described == {
        "python_version": info.python_version,
        "num_files": info.num_files,
        "num_bytes": info.num_bytes,
        "digest": info.digest,
    }


def test_rows_are_those_of_training_and_batches_are_full(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / f"{number}.txt").write_text(" ".join(str(number * step) for step in range(40)))
    tokenizer = train_tokenizer(["1 2 3"], vocab_size=259)
    rows = load_rows(tokenizer, str(tmp_path), block_length=16, group_size=4, seed=3)
    expected = make_blocks(load_corpus(tmp_path), tokenizer, block_length=16, group_size=4, seed=3)
    assert {name: split["input_ids"] for name, split in rows.items()} == {
        name: split["input_ids"] for name, split in expected.items()
    }
    split = rows["train"].select(range(10))
    batches = list(make_batches(split, tokenizer, 4, 9))
    ids = torch.cat([batch["input_ids"] for batch in batches])
    assert ids.tolist() == split["input_ids"][:8]  # the last two fill no batch
    assert all(batch["labels"].tolist() == batch["input_ids"].tolist() for batch in batches)
    assert len(list(make_batches(split, tokenizer, 4, 1))) == 1
    (masked,) = make_batches(split, tokenizer, 8, 1, masked=True)
    is_masked = masked["labels"] != -100
    assert 0 < is_masked.sum() < is_masked.numel() / 2


def test_further_packages_are_in_the_description_of_a_machine() -> None:
    assert list(describe_machine("cpu", "numpy")["versions"]) == ["python", "torch", "transformers", "numpy"]
