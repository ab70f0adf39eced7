"""What the training scripts can be told: recipes and the command line."""

import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import Qwen3Config, TrainingArguments

from mot_hf import MoTConfig, MoTForCausalLM
from mot_hf.sizes import count_flops, count_parameters
from mot_hf.training import CorpusArguments, MethodArguments, ModelArguments, parse_arguments
from tests.models import tiny_config
from tests.training.language_runs import plain_tokenizer, save_base, train

ALL_RECIPES = sorted((Path(__file__).parents[2] / "mot_hf" / "recipes").rglob("*.yaml"))
# Those for language models; the one for conversations has other arguments.
RECIPES = [path for path in ALL_RECIPES if path.parent.name == "recipes" and path.stem != "sft"]
CLASSES = (ModelArguments, CorpusArguments, TrainingArguments, MethodArguments)


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_defaults(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("hidden_size: 96\nnum_experts: 64\nlearning_rate: 5e-4\n")
    output = ["--output_dir", str(tmp_path)]
    model, corpus, training, _ = parse_arguments(CLASSES, [str(recipe), "--num_experts", "128", *output])
    assert (model.hidden_size, model.num_experts, model.group_size) == (96, 128, None)
    assert [name for name in ("hidden_size", "num_experts", "group_size") if model.is_meant(name)] == ["num_experts"]
    assert training.learning_rate == 5e-4
    assert corpus == CorpusArguments()
    assert parse_arguments(CLASSES, output)[0] == ModelArguments()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_understood_and_fills_its_groups(recipe: Path, tmp_path: Path) -> None:
    # bf16 needs a GPU, or to be told that there is none.
    model, _, training, _ = parse_arguments(CLASSES, [str(recipe), "--output_dir", str(tmp_path), "--use_cpu", "true"])
    assert training.per_device_train_batch_size % MoTConfig(**model.config_fields()).group_size == 0
    assert training.train_sampling_strategy == "sequential"
    assert training.dataloader_drop_last
    assert "# Source: " in recipe.read_text()


@pytest.mark.parametrize("recipe", ALL_RECIPES, ids=lambda path: path.stem)
def test_a_run_of_every_recipe_can_be_resumed_or_the_recipe_says_why_not(recipe: Path) -> None:
    text = recipe.read_text()
    values = yaml.safe_load(text)
    assert not values.get("save_only_model")
    if values.get("save_strategy") == "no":
        assert re.search(r"^# .*[Nn]othing is saved before", text, re.MULTILINE)
    else:
        assert 0 < values["save_steps"] <= values["max_steps"] / 8
        assert values["save_total_limit"] >= 2


def test_every_field_of_the_configuration_can_be_set_or_follows_from_text_and_tokenizer() -> None:
    of_the_text = {"vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"}
    derived = {"is_causal", "use_cache"}  # from `masked`; and generation alone needs a cache
    own = set(inspect.get_annotations(MoTConfig)) - of_the_text - derived
    assert own == {each.name for each in fields(ModelArguments)} - {"model_name_or_path", "masked", "from_recipe"}


def test_what_is_not_given_has_the_stated_default_of_the_configuration() -> None:
    config = MoTConfig(**ModelArguments().config_fields())
    for each in fields(ModelArguments):
        if stated := re.search(r"(\d[\d.e-]*) by default", each.metadata.get("help", "")):
            assert getattr(config, each.name) == float(stated[1]), each.name


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


class TestCheckpoint:
    """What is given beside a checkpoint to train further."""

    @pytest.mark.parametrize(
        ("field", "value", "own"),
        [
            ("num_experts", 64, 8),
            ("hidden_size", 64, 32),
            ("group_size", 8, 4),
            ("num_hidden_layers", 2, 4),
            ("tie_word_embeddings", True, False),
            ("mlp_layer_types", ["sparse"] * 4, ["dense", "dense", "sparse", "sparse"]),
            ("router_initializer_range", 0.5, 0.1),
        ],
    )
    def test_another_architecture_is_refused_by_name(self, field: str, value: Any, own: Any) -> None:
        args = ModelArguments(model_name_or_path="base", **{field: value})
        with pytest.raises(ValueError, match="The architecture of a checkpoint cannot be changed") as raised:
            args.check_checkpoint(tiny_config())
        assert f"{field}={value!r} instead of {own!r}. Remove" in str(raised.value)

    def test_what_is_not_in_the_weights_can_be_changed(self) -> None:
        changes = {"companion_momentum": 0.5, "max_position_embeddings": 96, "attention_dropout": 0.25}
        args = ModelArguments(model_name_or_path="base", rope_parameters='{"rope_theta": 5.0}', **changes)
        args.check_checkpoint(tiny_config())
        assert args.config_fields() == changes | {"rope_parameters": {"rope_theta": 5.0}}

    def test_the_same_architecture_and_what_can_be_changed_are_fine(self) -> None:
        args = ModelArguments(model_name_or_path="base", num_experts=8, num_experts_per_tok=1, mixing="moe")
        args.check_checkpoint(tiny_config())
        assert args.config_fields() == {"num_experts_per_tok": 1, "mixing": "moe"}

    def test_the_values_of_a_recipe_give_way_and_those_of_the_command_line_do_not(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("hidden_size: 96\nnum_experts: 8\n")
        arguments = [str(recipe), "--model_name_or_path", "base", "--output_dir", str(tmp_path)]
        parse_arguments(CLASSES, arguments)[0].check_checkpoint(tiny_config())
        assert (
            "The recipe's values hidden_size=96 are ignored, as they are for a new model: the checkpoint 'base'"
            in caplog.text
        )
        given = parse_arguments(CLASSES, [*arguments, "--hidden_size", "96"])[0]
        with pytest.raises(ValueError, match="hidden_size=96 instead of 32"):
            given.check_checkpoint(tiny_config())

    def test_the_script_refuses_and_warns_before_it_reads_text(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        base = save_base(tmp_path / "base", plain_tokenizer())
        with pytest.raises(ValueError, match="num_experts=64 instead of 8"):
            train(tmp_path / "run", "no text", model={"model_name_or_path": base, "num_experts": 64})
        with pytest.raises(OSError, match="no text"):
            train(tmp_path / "run", "no text", model={"model_name_or_path": base}, corpus={"block_length": 128})
        assert "`block_length=128` tokens are longer than the rows" in caplog.text
        Qwen3Config().save_pretrained(tmp_path / "dense")
        with pytest.raises(ValueError, match=r"of type 'qwen3', not a MoT model: convert .* `mot upcycle`"):
            train(tmp_path / "run", "no text", model={"model_name_or_path": str(tmp_path / "dense")})
