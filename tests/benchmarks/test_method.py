"""The benchmark of training methods, at a tiny size."""

import json
from pathlib import Path

import pytest

from mot_hf import MoTConfig
from scripts.benchmarks.method.run import METHODS, Arguments, summarise
from tests.scripts.running import REPOSITORY, environment_of, run_python

RECIPE = REPOSITORY / "scripts" / "benchmarks" / "method" / "recipes" / "grid.yaml"


def test_methods_change_fields_of_the_configuration() -> None:
    for method in METHODS.values():
        assert method.config.keys() <= set(MoTConfig.__dataclass_fields__)
    with pytest.raises(ValueError, match="`methods` has 'soft_moe', which must be one of: cross_example; "):
        Arguments(methods=["soft_moe"])


def test_seeds_of_a_method_are_averaged() -> None:
    runs = [
        {
            "method": "moe",
            "seed": seed,
            "losses": [5.0, loss],
            "loss_as_trained": loss,
            "minutes": 1.0,
            "mixing": [{"step": 1, "mixing/busiest_expert/layers_2": 2.0 + seed, "mixing/idle_experts/layers_2": 0.0}],
        }
        for seed, loss in enumerate([1.0, 3.0])
    ]
    (moe,) = summarise(runs)
    assert (moe["mean"], moe["losses"], moe["busiest"]) == (2.0, [1.0, 3.0], [2.0, 3.0])
    assert moe["deviation"] == pytest.approx(2**0.5)


@pytest.mark.slow
def test_finished_runs_are_kept(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for index in range(8):
        (text / f"{index}.txt").write_text(f"a text of some words and the number {index}. " * 60)
    sizes = ["--hidden_size", "16", "--intermediate_size", "16", "--num_attention_heads", "1", "--num_experts", "8"]
    sizes += ["--group_size", "4", "--num_hidden_layers", "2", "--num_dense_layers", "1", "--vocab_size", "300"]
    training = ["--max_steps", "4", "--eval_steps", "2", "--logging_steps", "2", "--per_device_train_batch_size", "4"]
    options = ["--source", str(text), "--block_length", "8", *sizes, *training, "--output_dir", str(tmp_path / "out")]
    options += ["--methods", "per_sequence, normalised", "25 % cross_example, then moe"]
    command = ["-m", "scripts.benchmarks.method.run", RECIPE, *options]
    environment = environment_of(tmp_path) | {"PYTHONPATH": str(REPOSITORY)}
    run_python(tmp_path, *command, environment=environment)
    first = json.loads((tmp_path / "out" / "method.json").read_text())
    assert [len(run["losses"]) for run in first["results"]] == [2, 2]
    assert all(method["busiest"] and method["idle"] for method in first["methods"])
    run_python(tmp_path, *command, "--jobs", "2", environment=environment)
    assert json.loads((tmp_path / "out" / "method.json").read_text()) == first
