"""The demo, for a few steps in a process of its own, and the README's examples after it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text()

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the demo has run."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, REPOSITORY / "scripts" / "demo.py", "--max_steps", "10", "--vocab_size", "512"]
    completed = subprocess.run(command, cwd=folder, env=offline(folder), capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    (folder / "printed.txt").write_text(completed.stdout)
    return folder


def offline(folder: Path) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "COLUMNS": "100"}


def test_demo_leaves_a_model_a_picture_and_results(folder: Path) -> None:
    run = folder / "runs" / "demo"
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {path.name for path in (run / "model").iterdir()}
    assert (run / "training_curve.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(run.glob("checkpoint-*"))) == 2
    results = json.loads((run / "results.json").read_text())
    losses = [results["modes"][mode]["loss"] for mode in ("cross_example", "per_sequence", "moe")]
    assert all(4 < loss < 6.2 for loss in losses)  # below the log of the vocabulary's size
    assert len(set(losses)) == 3
    assert results["parameters"] > 5 * results["active_parameters"]
    assert results["tokens_per_second"] > 0
    assert len(results["corpus"]["digest"]) == 64


def test_demo_prints_completions_the_table_and_where_things_are(folder: Path) -> None:
    printed = (folder / "printed.txt").read_text()
    for wanted in ("def __init__(self,", "mode per_sequence", "cross_example", "moe (without tuning)"):
        assert wanted in printed
    assert "runs/demo/model" in printed
    assert "runs/demo/training_curve.png" in printed


def test_readme_examples_run(folder: Path) -> None:
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(examples) >= 4
    for example in examples:
        completed = subprocess.run(
            [sys.executable, "-c", example], cwd=folder, env=offline(folder), capture_output=True, text=True
        )
        assert completed.returncode == 0, f"{example}\n{completed.stderr}"
