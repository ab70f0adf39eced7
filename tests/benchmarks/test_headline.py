"""The comparison of architectures: models of equal cost, one set of rows, and the headline that is read off."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainingArguments

from mot_hf.modeling.companions_mot import NUM_POSITION_BUCKETS
from scripts.benchmarks.comparison import (
    ARCHITECTURES,
    ComparisonArguments,
    collate_rows,
    load_text,
    make_model,
    make_step,
    validation_loss,
)
from scripts.benchmarks.headline.run import Arguments
from scripts.benchmarks.settings.run import parse_variant
from tests.scripts.running import REPOSITORY, run_script

RECIPES = {
    topic: REPOSITORY / "scripts" / "benchmarks" / topic / "recipes" / "cpu.yaml"
    for topic in ("headline", "precision", "settings")
}
TINY = ComparisonArguments(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_dense_layers=1, group_size=4, num_experts=8,
    vocab_size=300, block_length=8, num_eval_rows=6,
)  # fmt: skip


def test_all_architectures_have_the_same_experts_and_cost_a_token_the_same_but_for_controllers_and_mixing() -> None:
    ids = torch.zeros(8, 8, dtype=torch.long)
    flops = {}
    for name in ARCHITECTURES:
        model = make_model(name, TINY)
        with FlopCounterMode(display=False) as counter:
            model.set_experts_implementation("eager")
            model(ids)
        flops[name] = counter.get_total_flops()
    per_token_and_expert = 2 * TINY.hidden_size * TINY.num_experts * ids.numel()
    num_groups = ids.numel() // TINY.group_size
    # Mixtures and outputs, summed over all groups and over those of each bucket; and the log masses.
    num_sums = 2 * (1 + NUM_POSITION_BUCKETS)
    statistics = 2 * num_groups * TINY.num_experts * (num_sums * TINY.hidden_size + 1)
    assert flops["mot"] == flops["dense"] + 3 * per_token_and_expert + statistics
    assert flops["qwen3_moe"] == flops["dense"] + per_token_and_expert
    assert make_model("mot", TINY).num_parameters() == make_model("qwen3_moe", TINY).num_parameters()


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'soft_moe'.*dense, mot, qwen3_moe"):
        make_model("soft_moe", TINY)


def test_the_load_balancing_loss_is_trained_with_but_not_reported(tmp_path: Path) -> None:
    text = load_text(ComparisonArguments(**{**vars(TINY), "source": str(make_files(tmp_path))}))
    model = make_model("qwen3_moe", TINY)
    rows = text["validation"]
    ids = rows["input_ids"][:]
    with torch.no_grad():
        trained = model(ids, labels=ids)
        expected = model(ids, labels=ids, output_router_logits=False).loss
    assert trained.loss > expected + 0.005
    assert validation_loss(model, rows, batch_size=4) == pytest.approx(expected.item(), rel=1e-5)
    assert model.training


def make_files(folder: Path) -> Path:
    """A folder of many short texts, some of which are held out."""
    texts = folder / "texts"
    texts.mkdir()
    for number in range(200):
        (texts / f"{number}.txt").write_text(" ".join(str(number * step) for step in range(60)))
    return texts


def test_rows_are_stacked_with_their_own_tokens_as_labels() -> None:
    batch = collate_rows([{"input_ids": torch.arange(3)}, {"input_ids": torch.arange(3, 6)}])
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_timed_step_trains(tmp_path: Path) -> None:
    model = make_model("mot", TINY)
    before = {name: value.clone() for name, value in model.named_parameters()}
    step = make_step(model, TrainingArguments(tmp_path, report_to="none", use_cpu=True), torch.zeros(4, 8).long())
    step()
    after = dict(model.named_parameters())
    assert [name for name in before if torch.equal(before[name], after[name]) and "norm" not in name] == []
    assert all(value.grad is None for value in after.values())


@pytest.mark.slow
def test_the_headline_is_read_off_and_finished_runs_are_not_repeated(tmp_path: Path) -> None:
    texts = make_files(tmp_path)
    recipe = RECIPES["headline"]
    arguments = ["--source", texts, "--output_dir", tmp_path / "headline"]
    arguments += ["--num_experts", "32", "--vocab_size", "300"]
    arguments += ["--per_device_train_batch_size", "32", "--tuning_share", "0.3", "--num_finalists", "2"]
    arguments += ["--max_steps", "20", "--num_rounds", "2"]
    arguments += ["--eval_steps", "2", "--learning_rates", "1e-4", "0.03", "--num_eval_rows", "32"]
    arguments += ["--block_length", "8"]
    run_script(tmp_path, "headline", recipe, *arguments)
    record: dict[str, Any] = json.loads((tmp_path / "headline" / "headline.json").read_text())
    runs = {run["architecture"]: run for run in record["results"]}
    assert list(runs) == list(ARCHITECTURES)
    assert {run["learning_rate"] for run in runs.values()} == {0.03}
    for run in runs.values():
        assert run["steps"] == list(range(2, 22, 2))
        assert run["losses"][-1] < run["other_learning_rates"]["0.0001"]
        points = zip(run["steps"], run["losses"], strict=True)
        reached = [step for step, loss in points if loss <= runs["dense"]["losses"][-1]]
        assert run["share_of_steps"] == (reached[0] / 20 if reached else None)
    assert runs["dense"]["share_of_steps"] == runs["dense"]["share_of_time"] == 1
    assert "seconds" not in record["timing"]["steps"]["mot"]
    assert (tmp_path / "headline" / "headline.png").read_bytes().startswith(b"\x89PNG")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "headline" / "runs").glob("t*ing_*.json")}
    assert len(times) == 12
    printed = run_script(tmp_path, "headline", recipe, *arguments)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert printed.strip().endswith((tmp_path / "headline" / "headline.md").read_text().strip())


@pytest.mark.slow
def test_each_precision_is_trained_in_and_only_bfloat16_rounds_the_parameters(tmp_path: Path) -> None:
    recipe = RECIPES["precision"]
    arguments = ["--source", make_files(tmp_path), "--output_dir", tmp_path / "precision", "--num_experts", "32"]
    arguments += ["--per_device_train_batch_size", "32", "--max_steps", "4", "--eval_steps", "2"]
    arguments += ["--block_length", "8"]
    arguments += ["--architectures", "mot", "qwen3_moe", "--learning_rates", "0.01", "0.02", "--num_eval_rows", "32"]
    printed = run_script(tmp_path, "precision", recipe, *arguments, "--vocab_size", "300", "--warmup_steps", "1")
    runs = json.loads((tmp_path / "precision" / "precision.json").read_text())["results"]
    assert [(run["architecture"], run["precision"], run["learning_rate"]) for run in runs] == [
        (name, precision, rate)
        for name, rate in (("mot", 0.01), ("qwen3_moe", 0.02))
        for precision in ("float32", "mixed", "bfloat16")
    ]
    for of_one in (runs[:3], runs[3:]):
        assert len({run["losses"][-1] for run in of_one}) == 3
        assert all(run["losses"][-1] < run["losses"][0] < 6.5 for run in of_one)
    assert printed.strip().endswith((tmp_path / "precision" / "precision.md").read_text().strip())


@pytest.mark.slow
def test_settings_are_compared_one_at_a_time(tmp_path: Path) -> None:
    recipe = RECIPES["settings"]
    variants = ["base", "dense", "num_experts=64", "group_size=16,num_experts=32", "learning_rate=0.001,max_steps=2"]
    arguments = ["--source", make_files(tmp_path), "--output_dir", tmp_path / "settings", "--num_experts", "32"]
    arguments += ["--per_device_train_batch_size", "32", "--max_steps", "4", "--eval_steps", "2"]
    arguments += ["--block_length", "8"]
    arguments += ["--vocab_size", "300", "--num_eval_rows", "32", "--learning_rate", "0.02", "--variants", *variants]
    printed = run_script(tmp_path, "settings", recipe, *arguments)
    runs = json.loads((tmp_path / "settings" / "settings.json").read_text())["results"]
    assert [run["variant"] for run in runs] == variants
    assert [run["steps"] for run in runs] == [[2, 4]] * 4 + [[2]]
    base, dense, more, smaller_groups, _ = runs
    assert dense["flops_per_token"] < base["flops_per_token"] < more["flops_per_token"]
    assert dense["num_parameters"] < smaller_groups["num_parameters"] < base["num_parameters"]
    assert len({run["losses"][-1] for run in runs}) == 5
    assert printed.strip().endswith((tmp_path / "settings" / "settings.md").read_text().strip())


# Each with what makes it quick: little text, few steps, one run.
ALONE = {
    "precision": ["--architectures", "mot", "--learning_rates", "0.01", "--precisions", "float32"],
    "settings": ["--variants", "base"],
    "headline": ["--architectures", "dense", "--parts", "training", "--learning_rates", "0.01"],
}


@pytest.mark.slow
@pytest.mark.parametrize("topic", ALONE)
def test_a_run_is_never_reported_as_one_of_other_settings(topic: str, tmp_path: Path) -> None:
    arguments: list[str | Path] = ["--source", make_files(tmp_path), "--output_dir", tmp_path / topic, *ALONE[topic]]
    arguments += ["--num_experts", "32", "--block_length", "8", "--vocab_size", "300", "--num_eval_rows", "32"]
    arguments += ["--per_device_train_batch_size", "32", "--warmup_steps", "1", "--eval_steps", "2"]
    recipe = RECIPES[topic]
    run_script(tmp_path, topic, recipe, *arguments, "--max_steps", "4")
    stored = (tmp_path / topic / f"{topic}.json").read_text()
    differing = "hidden_size is 32 there, 64 here; max_steps is 4 there, 12 here. Choose another `--output_dir`"
    with pytest.raises(ValueError, match=differing):
        run_script(tmp_path, topic, recipe, *arguments, "--max_steps", "12", "--hidden_size", "64")
    assert (tmp_path / topic / f"{topic}.json").read_text() == stored
    run_script(tmp_path, topic, recipe, *arguments, "--max_steps", "4", "--logging_steps", "1")
    (result,) = json.loads((tmp_path / topic / f"{topic}.json").read_text())["results"]
    assert result["steps"] == [2, 4]
    assert result == json.loads(stored)["results"][0]


@pytest.mark.slow
def test_a_headline_is_made_in_parts_and_no_part_is_of_other_settings(tmp_path: Path) -> None:
    arguments: list[str | Path] = ["--source", make_files(tmp_path), "--output_dir", tmp_path / "parts"]
    arguments += ["--num_experts", "32", "--block_length", "8", "--vocab_size", "300", "--num_eval_rows", "32"]
    arguments += ["--per_device_train_batch_size", "32", "--eval_steps", "2", "--max_steps", "4", "--num_rounds", "2"]
    arguments += ["--tuning_share", "0.5"]

    def run(*parts: str) -> None:
        run_script(tmp_path, "headline", RECIPES["headline"], *arguments, *parts)

    run("--architectures", "mot", "--parts", "training", "--learning_rates", "0.01", "--num_finalists", "2")
    assert not (tmp_path / "parts" / "headline.json").exists()  # nothing to compare with yet
    run("--architectures", "dense", "--parts", "tuning", "training", "--learning_rates", "0.01", "0.02")
    run("--architectures", "dense", "mot", "--parts", "timing")
    record = json.loads((tmp_path / "parts" / "headline.json").read_text())
    assert [run["architecture"] for run in record["results"]] == ["dense", "mot"]
    assert all(run["relative_step_time"] > 0 for run in record["results"])
    assert len(record["tuning"]["dense"]) == 2
    for runs in ("training_*.json", "tuning_*.json", "timing.json"):
        with pytest.raises(
            ValueError, match=r"parts/runs/t\w+ing.*.json' was made .* hidden_size is 32 there, 64 here"
        ):
            run("--architectures", "dense", "--parts", "timing", "--hidden_size", "64")
        for path in (tmp_path / "parts" / "runs").glob(runs):
            path.unlink()


def test_times_need_the_dense_model() -> None:
    with pytest.raises(ValueError, match=r"`architectures=\['mot'\]` cannot be timed without 'dense'"):
        Arguments(architectures=["mot"])
    assert Arguments(architectures=["mot"], parts=["training"]).architectures == ["mot"]


@pytest.mark.parametrize(("topic", "place"), [("settings", "cpu"), ("precision", "cpu"), ("precision", "gpu")])
def test_the_recipes_compare_the_headlines_models_trained_alike(topic: str, place: str) -> None:
    recipe, of_headline = (
        yaml.safe_load((RECIPES[name].parent / f"{place}.yaml").read_text()) for name in (topic, "headline")
    )
    own = {"output_dir", "max_steps", "architectures", "variants", "learning_rate", "learning_rates", "bf16"}
    assert {name: value for name, value in recipe.items() if name not in own} == {
        name: value for name, value in of_headline.items() if name not in own
    }


@pytest.mark.parametrize("variant", ["experts=2", "num_experts", "num_experts=", "base,num_experts=2"])
def test_a_variant_must_name_fields_with_values(variant: str) -> None:
    with pytest.raises(ValueError, match=f"`variants` has '{variant}'"):
        parse_variant(variant)
    assert parse_variant("base") == ({}, {})
    assert parse_variant("num_experts=64,learning_rate=1.0e-3") == ({"num_experts": 64}, {"learning_rate": 0.001})
