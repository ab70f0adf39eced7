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
from scripts.benchmarks.headline.run import Arguments, summarise
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


def make_run(method: str, seed: int, rate: float, losses: list[float]) -> dict[str, Any]:
    """A run as its file holds it."""
    run = {"method": method, "seed": seed, "learning_rate": rate, "losses": losses, "steps": [10, 20, 30, 40]}
    return run | {"num_parameters": 10, "settings": {}, "machine": {}}


def test_the_headline_is_read_off_the_best_learning_rate_of_every_method() -> None:
    runs = [
        make_run("dense", 0, 1e-3, [4.0, 3.5, 3.2, 3.0]),
        make_run("dense", 0, 1e-2, [4.0, 3.5, 3.2, 3.1]),
        make_run("dense", 1, 1e-3, [4.0, 3.5, 3.2, 3.2]),
        make_run("cross_example", 0, 1e-3, [3.9, 3.1, 3.0, 2.9]),
        make_run("Qwen3-MoE", 0, 1e-2, [3.9, 3.3, 2.9, 2.8]),
    ]
    timing = {"steps": {name: {"relative_time": time} for name, time in (("dense", 1.0), ("cross_example", 1.5))}}
    dense, mot, rival = summarise(runs, timing)
    assert (dense["learning_rate"], dense["final_losses"], dense["losses"]) == (1e-3, [3.0, 3.2], [4.0, 3.5, 3.2, 3.1])
    assert dense["first_seed_by_learning_rate"] == {"0.001": 3.0, "0.01": 3.1}
    assert dense["deviation"] == pytest.approx(0.2 / 2**0.5)
    assert [each["share_of_steps_to_dense"] for each in (dense, mot, rival)] == [1.0, 0.5, 0.75]
    assert [each["share_of_time_to_dense"] for each in (dense, mot, rival)] == [1.0, 0.75, None]
    assert [each["share_of_steps_to_Qwen3-MoE"] for each in (dense, mot, rival)] == [None, None, 1.0]


@pytest.mark.slow
def test_a_headline_is_trained_in_parts_and_finished_runs_are_not_repeated(tmp_path: Path) -> None:
    recipe = RECIPES["headline"]
    arguments: list[str | Path] = ["--source", make_files(tmp_path), "--output_dir", tmp_path / "headline"]
    arguments += ["--num_experts", "32", "--vocab_size", "300", "--per_device_train_batch_size", "32"]
    arguments += ["--max_steps", "20", "--eval_steps", "2", "--num_rounds", "2", "--num_eval_rows", "32"]
    arguments += ["--block_length", "8", "--learning_rates", "1e-4", "0.03", "--seeds", "0", "1"]
    parts = ["--methods", "cross_example", "--parts", "training"]
    run_script(tmp_path, "headline", recipe, *arguments, *parts)
    assert not (tmp_path / "headline" / "headline.json").exists()
    run_script(tmp_path, "headline", recipe, *arguments, "--methods", "dense", "cross_example", "--jobs", "2")
    record: dict[str, Any] = json.loads((tmp_path / "headline" / "headline.json").read_text())
    methods = {each["method"]: each for each in record["results"]}
    assert list(methods) == ["dense", "cross_example"]
    for each in methods.values():
        assert (each["learning_rate"], each["seeds"], each["steps"]) == (0.03, [0, 1], list(range(2, 22, 2)))
        assert each["final_losses"][0] < each["first_seed_by_learning_rate"]["0.0001"]
        assert len(set(each["final_losses"])) == 2
    assert methods["dense"]["share_of_steps_to_dense"] == methods["dense"]["share_of_time_to_dense"] == 1
    assert methods["dense"]["flops_per_token"] < methods["cross_example"]["flops_per_token"]
    assert "seconds" not in record["timing"]["steps"]["cross_example"]
    assert (tmp_path / "headline" / "headline.png").read_bytes().startswith(b"\x89PNG")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "headline" / "runs").glob("*_*.json")}
    assert len(times) == 6
    printed = run_script(tmp_path, "headline", recipe, *arguments, *parts, "summary")
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert printed.strip().endswith((tmp_path / "headline" / "headline.md").read_text().strip())
    for runs in ("*_*.json", "timing.json"):
        with pytest.raises(
            ValueError, match=r"headline/runs/\w+.*.json' was made .* hidden_size is 32 there, 64 here"
        ):
            run_script(tmp_path, "headline", recipe, *arguments, "--parts", "summary", "--hidden_size", "64")
        for path in (tmp_path / "headline" / "runs").glob(runs):
            path.unlink()


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
    "headline": ["--methods", "dense", "--learning_rates", "0.01", "--seeds", "0", "--num_rounds", "2"],
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


def test_times_need_the_dense_model() -> None:
    with pytest.raises(ValueError, match=r"`methods=\['cross_example'\]` cannot be timed without 'dense'"):
        Arguments(methods=["cross_example"])
    assert Arguments(methods=["cross_example"], parts=["training"]).methods == ["cross_example"]
    with pytest.raises(ValueError, match=r"`methods` has 'mot', which must be one of: dense; cross_example; "):
        Arguments(methods=["mot"])


@pytest.mark.parametrize(("topic", "place"), [("settings", "cpu"), ("precision", "cpu"), ("precision", "gpu")])
def test_the_recipes_compare_the_headlines_models_trained_alike(topic: str, place: str) -> None:
    recipe, of_headline = (
        yaml.safe_load((RECIPES[name].parent / f"{place}.yaml").read_text()) for name in (topic, "headline")
    )
    own = {"output_dir", "max_steps", "architectures", "variants", "learning_rate", "learning_rates", "bf16", "device"}
    own |= {"save_strategy", "save_steps", "save_total_limit"}
    assert {name: value for name, value in recipe.items() if name not in own} == {
        name: value for name, value in of_headline.items() if name not in own
    }


@pytest.mark.parametrize("variant", ["experts=2", "num_experts", "num_experts=", "base,num_experts=2"])
def test_a_variant_must_name_fields_with_values(variant: str) -> None:
    with pytest.raises(ValueError, match=f"`variants` has '{variant}'"):
        parse_variant(variant)
    assert parse_variant("base") == ({}, {})
    assert parse_variant("num_experts=64,learning_rate=1.0e-3") == ({"num_experts": 64}, {"learning_rate": 0.001})
