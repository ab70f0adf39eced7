"""What the training scripts can be told: recipes and the command line."""

import re
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from mot_hf import MoTConfig, MoTForCausalLM
from mot_hf.reporting.sizes import count_flops, count_parameters
from mot_hf.training import CorpusArguments, MethodArguments, ModelArguments, parse_arguments

RECIPES = sorted((Path(__file__).parents[2] / "scripts" / "recipes").glob("*.yaml"))
CLASSES = (ModelArguments, CorpusArguments, TrainingArguments, MethodArguments)


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_defaults(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("hidden_size: 96\nnum_experts: 64\nlearning_rate: 5e-4\n")
    output = ["--output_dir", str(tmp_path)]
    model, corpus, training, _ = parse_arguments(CLASSES, [str(recipe), "--num_experts", "128", *output])
    assert (model.hidden_size, model.num_experts, model.group_size) == (96, 128, 32)
    assert training.learning_rate == 5e-4
    assert corpus == CorpusArguments()
    assert parse_arguments(CLASSES, output)[0] == ModelArguments()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_understood_and_fills_its_groups(recipe: Path, tmp_path: Path) -> None:
    # bf16 needs a GPU, or to be told that there is none.
    model, _, training, _ = parse_arguments(CLASSES, [str(recipe), "--output_dir", str(tmp_path), "--use_cpu", "true"])
    assert training.per_device_train_batch_size % model.group_size == 0
    assert training.train_sampling_strategy == "sequential"
    assert training.dataloader_drop_last
    assert "# Source: " in recipe.read_text()


@pytest.mark.parametrize("recipe", [path for path in RECIPES if path.stem != "transition"], ids=lambda path: path.stem)
def test_every_recipe_states_its_size(recipe: Path, tmp_path: Path) -> None:
    stated = re.search(r"# (.+) million parameters, .* uses (.+) million; (.+) million FLOPs", recipe.read_text())
    assert stated
    arguments = [str(recipe), "--output_dir", str(tmp_path), "--use_cpu", "true"]
    model_args, corpus_args, *_ = parse_arguments(CLASSES, arguments)
    config = MoTConfig(**model_args.config_fields(), vocab_size=corpus_args.vocab_size)
    with torch.device("meta"):
        model = MoTForCausalLM(config)
    size, flops = count_parameters(model), count_flops(model, corpus_args.block_length)
    measured = [f"{value / 1e6:.1f}" for value in (size.total, size.active, flops)]
    assert list(stated.groups()) == measured


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hidden_sizes: 96\nseeds: 1\n", "names unknown arguments: hidden_sizes, seeds"),
        ("- hidden_size\n", "must be a mapping"),
        ("", "must be a mapping"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(text: str, message: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_arguments(CLASSES, [str(recipe)])


def test_a_recipe_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"nothing\.yaml"):
        parse_arguments(CLASSES, [str(tmp_path / "nothing.yaml")])
