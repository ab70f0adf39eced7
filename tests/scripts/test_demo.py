"""The demo, for a few steps in a process of its own; what evaluates its model, and the README's examples after it."""

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


def test_evaluate_modes_measures_every_number_of_experts(folder: Path) -> None:
    script = REPOSITORY / "scripts" / "evaluate_modes.py"
    arguments = ["--model_dirs", "runs/demo/model", "--max_rows", "128"]
    completed = subprocess.run(
        [sys.executable, script, *arguments], cwd=folder, env=offline(folder), capture_output=True, text=True
    )
    assert completed.returncode == 0, completed.stderr
    assert "E=32 G=32" in completed.stdout
    assert (folder / "runs" / "modes" / "modes.png").read_bytes().startswith(b"\x89PNG")
    (result,) = json.loads((folder / "runs" / "modes" / "modes.json").read_text())["results"]
    by_mean_output, by_mean_input = result["per_sequence"].values()
    assert list(by_mean_output) == ["0", "1", "2", "4", "8", "16", "32"]
    assert by_mean_output["32"] == pytest.approx(by_mean_input["32"])  # every expert is run: no constant
    assert by_mean_output["0"] != by_mean_input["0"]
    assert all(4 < loss < 6.2 for loss in (*by_mean_output.values(), result["cross_example"], result["moe"]))


def test_readme_examples_run(folder: Path) -> None:
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(examples) >= 4
    for example in examples:
        completed = subprocess.run(
            [sys.executable, "-c", example], cwd=folder, env=offline(folder), capture_output=True, text=True
        )
        assert completed.returncode == 0, f"{example}\n{completed.stderr}"
