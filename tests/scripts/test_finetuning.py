"""Fine-tuning and the comparison of it, for a few steps of something small."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification, TrainingArguments

from mot_hf import MoTForCausalLM
from mot_hf.data.classification import ClassificationArguments
from mot_hf.data.tokenizer import train_tokenizer
from mot_hf.training import parse_arguments
from tests.models import tiny_config
from tests.scripts.running import REPOSITORY, run_script

RECIPES = REPOSITORY / "mot_hf" / "recipes" / "finetune"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a MoT and a dense checkpoint."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(["def area(self, radius):\n    return radius ** 2\n"] * 9, vocab_size=300)
    for name, layers in (("mot", ["dense", "sparse"]), ("dense", ["dense", "dense"])):
        config = tiny_config(vocab_size=len(tokenizer), num_hidden_layers=2, mlp_layer_types=layers)
        MoTForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def write_rows(folder: Path) -> Path:
    """Write texts of a user's own, and a recipe that reads them."""
    rows = [{"review": f"{'good' if i % 2 else 'bad'} {i}", "stars": i % 2} for i in range(200)]
    (folder / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = folder / "reviews.yaml"
    columns = "\nsource: reviews.jsonl\ntext_column: review\nlabel_column: stars\n"
    recipe.write_text((RECIPES / "sequence.yaml").read_text() + columns)
    return recipe


def test_packages_of_functions(folder: Path) -> None:
    arguments = ["--model_name_or_path", "mot", "--output_dir", "packages", "--max_steps", "2"]
    printed = run_script(folder, "finetune_classification.py", RECIPES / "sequence.yaml", *arguments)
    metrics = json.loads((folder / "packages" / "eval_results.json").read_text())
    assert 0 < metrics["eval_accuracy"] < 1
    assert "eval_macro_f1" in printed
    model = AutoModelForSequenceClassification.from_pretrained(folder / "packages")
    assert {"asyncio", "email", "xml"} <= model.config.label2id.keys()


def test_texts_of_ones_own_and_the_comparison(folder: Path) -> None:
    arguments = ["--models", "mot", "dense", "--recipes", write_rows(folder), "--max_steps", "2"]
    arguments += ["--learning_rates", "1e-2", "1e-3", "--seeds", "0", "1", "--output_dir", "compared"]
    printed = run_script(folder, "finetuning", *arguments)
    assert (folder / "compared" / "finetuning.md").read_text().strip() in printed
    mot, dense = json.loads((folder / "compared" / "finetuning.json").read_text())["results"]
    assert list(mot["grid"]) == ["0.01", "0.001"]
    assert list(mot["seeds"]) == ["0", "1"]
    assert mot["seeds"]["0"]["per_sequence"] == mot["grid"][f"{mot['learning_rate']:g}"]
    assert list(mot["seeds"]["1"]) == ["majority", "cross_example", "per_sequence", "moe"]
    assert list(dense["seeds"]["1"]) == ["majority", "per_sequence"]


@pytest.mark.parametrize("task", ["sequence", "tokens"])
def test_recipes_are_understood(task: str, tmp_path: Path) -> None:
    arguments = [str(RECIPES / f"{task}.yaml"), "--model_name_or_path", "mot", "--output_dir", str(tmp_path)]
    args, training_args = parse_arguments((ClassificationArguments, TrainingArguments), arguments)
    assert args.task == task
    assert training_args.per_device_train_batch_size % 32 == 0
    assert not training_args.dataloader_drop_last  # which would drop validation texts
