"""The demo, for a few steps."""

import json
from pathlib import Path

import pytest

from mot_hf.data.default_corpus import default_corpus_files
from tests.scripts.running import run_script

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the demo has run, on an eighth of its text."""
    folder, files = tmp_path_factory.mktemp("demo"), default_corpus_files()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mot_hf.data.corpus.default_corpus_files", lambda: dict(list(files.items())[::8]))
        printed = run_script(folder, "demo.py", "--max_steps", "10", "--vocab_size", "512")
    (folder / "printed.txt").write_text(printed)
    return folder


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
