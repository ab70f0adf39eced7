"""Recipes and command lines: what is meant, and what is wrong with them."""

from pathlib import Path

import pytest
from transformers import TrainingArguments

from mot_hf.data.classification import ClassificationArguments
from mot_hf.training import (
    CorpusArguments,
    MethodArguments,
    ModelArguments,
    find_recipe,
    list_recipes,
    parse_arguments,
)
from mot_hf.training.recipes import describe_recipes

CLASSES = (ModelArguments, CorpusArguments, TrainingArguments, MethodArguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hidden_sizes: 96\nseeds: 1\n", r"unknown arguments: hidden_sizes \(did you mean `hidden_size`\?\), seeds"),
        ("- hidden_size\n", "must be a mapping"),
        ("", "must be a mapping"),
        ("seed: 1\nhidden_size: [1\nx: 2\n", r"recipe\.yaml', line 3, column 2 is not YAML"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(text: str, message: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_arguments(CLASSES, [str(recipe)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_eval_rows", "0"], "`max_eval_rows=0` must be at least 1"),
        (["--early_stopping_patience", "-1"], "`early_stopping_patience=-1` must be at least 1, or 0"),
    ],
)
def test_a_run_without_evaluation_or_an_end_at_once_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arguments(CLASSES, arguments)


def test_a_recipe_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"nothing\.yaml'.*: give a YAML file, or one of base_32e, .*small_clm"):
        parse_arguments(CLASSES, [str(tmp_path / "nothing.yaml")])
    with pytest.raises(OSError, match=r"'smal_clm' \(did you mean `small_clm`\?\)"):
        parse_arguments(CLASSES, ["smal_clm"])
    with pytest.raises(OSError, match=r"'small_cml' \(did you mean `small_[cm]lm` or `small_[cm]lm`\?\)"):
        parse_arguments(CLASSES, ["small_cml"])


def test_recipes_of_the_package_are_found_by_name() -> None:
    assert {"small_clm", "transition", "finetune/tokens"} <= set(list_recipes())
    assert find_recipe("small_clm") == find_recipe("small_clm.yaml") == list_recipes()["small_clm"]
    model, _, training, _ = parse_arguments(CLASSES, ["small_clm", "--use_cpu", "true"])
    assert (model.hidden_size, training.max_steps) == (128, 4000)
    assert not model.masked
    assert parse_arguments(CLASSES, ["small_mlm", "--use_cpu", "true"])[0].masked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--groupsize", "32"], r"no argument `--groupsize` \(did you mean `--group_size`\?\)"),
        (["--num_expert", "32"], r"no argument `--num_expert` \(did you mean `--num_experts`\?\)"),
        (["--group-sizes=32"], r"no argument `--group-sizes` \(did you mean `--group_size`\?\)"),
        (["--seed", "1", "small_clm"], "recipe 'small_clm' must come first"),
        (["small_clm", "small_mlm"], "recipe 'small_mlm' must come first, and there can be only one"),
        (["--seed", "1", "2"], "'2' belongs to no argument"),
        (["--mixing", "cross"], r"--mixing: invalid choice: 'cross' \(choose from '?cross_example"),
        (["--num_experts", "many"], "invalid int value: 'many'"),
        (["--rope_parameters", "{"], "is not JSON"),
        (["--accelerator_config", "{split"], r"argument --accelerator_config.*'\{split' is not JSON"),
        (["--lr_scheduler_kwargs", "0.1"], r"argument --lr_scheduler_kwargs.*'0.1' must be an object, such as"),
    ],
)
def test_a_wrong_argument_is_named_with_the_nearest(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arguments(CLASSES, arguments)


def test_without_an_output_folder_there_is_a_named_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("seed: 1\n")
    assert parse_arguments(CLASSES, [str(recipe)])[2].output_dir == "runs/mine"
    assert "`output_dir` is not given: everything is written to runs/mine." in caplog.text
    caplog.clear()
    assert parse_arguments(CLASSES, [str(recipe), "--output_dir", "there"])[2].output_dir == "there"
    assert parse_arguments(CLASSES, [])[2].output_dir == "runs/run"
    assert "runs/mine" not in caplog.text


def test_the_help_shows_our_arguments_apart_and_the_modes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse_arguments(CLASSES, ["--help"], prog="mot train")
    shown = capsys.readouterr().out
    assert shown.startswith("usage: mot train [RECIPE] [--name value ...]\n")
    titles = ["the model: a new one", "the text, the tokenizer and the rows:", "arguments of TrainingArguments:"]
    assert all(shown.index(title) > 0 for title in titles)
    assert "--mixing {cross_example,per_sequence,moe}" in shown
    assert "--hidden-size" not in shown
    assert "default: None" not in shown


def test_recipes_are_described_with_their_sizes() -> None:
    described = {recipe.name: recipe for recipe in describe_recipes()}
    assert set(described) == set(list_recipes())
    small = described["small_clm"]
    assert small[1:] == (10.5, 1.4, 2.4, 0.17, "A small causal model for trying things out on a CPU")
    assert described["transition"].million_parameters is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("max_steps: 10.5", "`max_steps: 10.5` must be an integer"),
        ("block_length: null", "`block_length: null` must be an integer"),
        ("learning_rate: [1]", r"`learning_rate: \[1\]` must be a number"),
        ("hidden_size: true", "`hidden_size: True` must be an integer"),
        ("mixing: both", "`mixing: both` must be one of cross_example, per_sequence, moe"),
    ],
)
def test_a_value_of_another_type_is_refused(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(line)
    with pytest.raises(ValueError, match=message):
        parse_arguments(CLASSES, [str(tmp_path / "recipe.yaml")])


def test_values_of_a_recipe_are_those_of_a_command_line(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("resume_from_checkpoint: true\nlearning_rate: 1\nmax_steps: 1.0e+2\nhidden_size: null\n")
    model, _, training, _ = parse_arguments(CLASSES, [str(recipe), "--use_cpu", "true"])
    assert (training.resume_from_checkpoint, training.learning_rate, training.max_steps) == ("true", 1.0, 100)
    assert isinstance(training.max_steps, int)
    assert model.hidden_size is None
    recipe.write_text("model_name_or_path: runs/clm\n")
    (arguments,) = parse_arguments((ClassificationArguments,), [str(recipe)])
    assert arguments.model_name_or_path == "runs/clm"
