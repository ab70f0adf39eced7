"""The benchmark of small batches: every task, variant and batch size, on a tiny model."""

import json
from pathlib import Path

import pytest

from mot_hf import MoTForCausalLM
from mot_hf.data.tokenizer import train_tokenizer
from scripts.benchmarks.small_batches import run as benchmark
from tests.models import tiny_config, trained
from tests.scripts.running import write_texts


@pytest.mark.slow
def test_it_fine_tunes_in_every_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = write_texts(tmp_path / "text", num_words=400)
    tokenizer = train_tokenizer([path.read_text() for path in texts.glob("*")], 300)
    model = tmp_path / "model"
    trained(MoTForCausalLM(tiny_config(vocab_size=300, group_size=8, max_position_embeddings=16))).save_pretrained(
        model
    )
    tokenizer.save_pretrained(model)
    args = {"batch_sizes": [8, 4], "source": str(texts), "num_rows": 16, "num_eval_rows": 16, "seeds": [0]}
    benchmark.main(benchmark.Arguments(str(model), str(tmp_path / "out"), num_rounds=2, **args))
    record = json.loads((tmp_path / "out" / "small_batches.json").read_text())
    modes = ["cross_example", "per_sequence", "moe"]
    full = ["cross_example", "per_sequence", benchmark.CALIBRATED, "moe"]
    found = [(run["task"], run["batch_size"], run["num_steps"], list(run["scores"])) for run in record["results"]]
    assert found == [
        ("full", 8, 2, full),
        ("full", 4, 4, [*full, benchmark.SMALLER_GROUP]),
        ("lora", 8, 2, modes),
        ("lora", 4, 4, modes),
        ("tokens", 8, 2, modes),
        ("tokens", 4, 4, modes),
    ]
    for run in record["results"]:
        losses = [[score["loss"] for score in scores] for scores in run["scores"].values()]
        assert len({loss for pair in losses for loss in pair}) == len(losses)  # none equals another
        assert all(0 <= score["macro_f1"] <= 1 for score in run["scores"]["moe"] if run["task"] == "tokens")
    assert {size: list(times) for size, times in record["times"].items()} == {"8": modes, "4": modes}
    assert all(times["cross_example"]["relative_time"] == 1 for times in record["times"].values())
    table = (tmp_path / "out" / "small_batches.md").read_text()
    assert table.count("\n") == 2 + 4 + 5 + 4 * 3
    assert table in capsys.readouterr().out


def test_seeds_are_described_by_mean_and_deviation() -> None:
    assert benchmark.describe([1.0, 2.0, 3.0]) == "2.000 ± 1.000"
    assert benchmark.describe([1.0]) == "1.000"
    scores = {"cross_example": [{"loss": 1.0}, {"loss": 2.0}], "moe": [{"loss": 1.5}, {"loss": 2.5}]}
    run = {"task": "full", "batch_size": 8, "num_steps": 4, "scores": scores}
    table = benchmark.make_table({"results": [run], "times": {}})
    assert table.splitlines()[-1] == "| full | 8 | 4 | moe | 2.000 ± 0.707 | 0.500 ± 0.000 |  |  |"


def test_parts_of_other_settings_are_not_put_together(tmp_path: Path) -> None:
    runs = [{"task": "full"}, {"task": "lora"}]
    stored = {"arguments": {"seeds": [0], "lora_rank": 8}, "results": runs, "times": {"8": {}}}
    (tmp_path / "small_batches.json").write_text(json.dumps(stored))
    args = benchmark.Arguments("runs/clm", str(tmp_path), parts=["times"])
    assert benchmark.read_stored(args, {"seeds": [0], "lora_rank": 8}) == {"results": runs, "times": {}}
    args = benchmark.Arguments("runs/clm", str(tmp_path), parts=["losses"], tasks=["lora"])
    assert benchmark.read_stored(args, {"seeds": [0], "lora_rank": 8}) == {"results": runs[:1], "times": {"8": {}}}
    with pytest.raises(ValueError, match=r"has results of `lora_rank=8`, not 4: choose another folder"):
        benchmark.read_stored(args, {"seeds": [0], "lora_rank": 4})


@pytest.mark.parametrize(("wrong", "known"), [({"tasks": ["dpo"]}, "full, lora, tokens"), ({"parts": ["x"]}, "times")])
def test_unknown_words_are_refused(wrong: dict[str, list[str]], known: str) -> None:
    with pytest.raises(ValueError, match=f"has '(dpo|x)', which must be one of: {known}"):
        benchmark.Arguments("runs/clm", **wrong)
