"""The model card: what it says, that its example runs, and whose card may be replaced."""

import contextlib
import io
import json
import re
from importlib.metadata import metadata
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from mot_cli import app
from mot_hf import MoTForCausalLM, MoTModel, MoTPreTrainedModel
from mot_hf.data.tokenizer import train_tokenizer
from mot_hf.registration import AUTO_CLASSES
from mot_hf.reporting.card import address_card, is_generated, write_card
from mot_hf.sizes import count_flops, count_parameters
from mot_hf.storage.record import TrainingRecord, read_record, write_record
from mot_hf.storage.run_log import find_run
from mot_hf.storage.saved_model import read_model
from mot_hf.training import add_lora, run_training
from tests.elsewhere import run_elsewhere
from tests.models import tiny_config, trained
from tests.training.language_runs import plain_tokenizer, save_base, train, write_text
from tests.training.trainers import make_trainer

TEXTS = [f"def function_{i}(a, b):\n    return a * {i} + b\n" * 10 for i in range(60)]
HEADS = [head for head, _ in AUTO_CLASSES.values()]
TASKS = {
    "MoTModel": "feature-extraction",
    "MoTForCausalLM": "text-generation",
    "MoTForMaskedLM": "fill-mask",
    "MoTForSequenceClassification": "text-classification",
    "MoTForTokenClassification": "token-classification",
    "MoTForQuestionAnswering": "question-answering",
}
each_head = pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, vocab_size=300)


def save(
    head: type[MoTPreTrainedModel], folder: Path, tokenizer: PreTrainedTokenizerFast | None = None
) -> MoTPreTrainedModel:
    model = trained(head(tiny_config(vocab_size=300, num_labels=2)))
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return model


def example_of(card: Path) -> str:
    found = re.search(r"^```python\n(.*?)^```$", card.read_text(), re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


def run_example(card: Path) -> str:
    """Run the example of a card beside its folder; returns what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.chdir(card.parent.parent):
        exec(example_of(card), {})
    return printed.getvalue().strip()


@each_head
def test_the_example_runs(head: type[MoTPreTrainedModel], tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = save(head, tmp_path, tokenizer)
    printed = run_example(write_card(tmp_path))
    if head is MoTForCausalLM:
        ids = tokenizer("The first ", return_tensors="pt").input_ids
        generated = model.generate(ids, max_new_tokens=20, do_sample=False)[0]
        assert printed == tokenizer.decode(generated, skip_special_tokens=True).strip()
    elif head is MoTModel:
        num_tokens = len(tokenizer("The first of all").input_ids)
        assert printed == f"torch.Size([1, {num_tokens}, 32])"
    else:
        assert printed


@each_head
@torch.no_grad()
def test_the_example_of_a_model_without_a_tokenizer_runs(head: type[MoTPreTrainedModel], tmp_path: Path) -> None:
    model = save(head, tmp_path)
    tokens = torch.tensor([[3, 1, 2]])
    answer = model.generate(tokens, max_new_tokens=20, do_sample=False) if head is MoTForCausalLM else model(tokens)[0]
    assert "without a tokenizer" in example_of(write_card(tmp_path))
    assert (
        re.findall(r"-?\d+\.?\d*", run_example(tmp_path / "README.md"))[:2]
        == (re.findall(r"-?\d+\.?\d*", str(answer))[:2])
    )


@pytest.mark.slow
def test_the_examples_run_where_mot_hf_is_not_installed(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for head in HEADS:
        save(head, tmp_path / head.__name__, tokenizer)
        (tmp_path / f"{head.__name__}.py").write_text(example_of(write_card(tmp_path / head.__name__)))
    names = [head.__name__ for head in HEADS]
    printed = run_elsewhere(
        tmp_path,
        "-c",
        "import sys\nsys.stderr = sys.stdout\n"  # questions and warnings too
        f"for name in {names}:\n    print('==', name)\n    exec(open(name + '.py').read(), {{}})",
    )
    assert "custom code" not in printed
    assert "instantiate a model of type" not in printed
    answers = re.split(r"^== ", printed, flags=re.MULTILINE)[1:]
    assert [answer.split("\n", 1)[0] for answer in answers] == names
    assert all(answer.split("\n", 1)[1].strip() for answer in answers)


@each_head
def test_the_metadata_are_those_of_the_head(head: type[MoTPreTrainedModel], tmp_path: Path) -> None:
    model = save(head, tmp_path / "small-model")
    card = ModelCard.load(write_card(tmp_path / "small-model", license="apache-2.0"))
    assert card.data.pipeline_tag == TASKS[head.__name__]
    assert (card.data.library_name, card.data.license) == ("transformers", "apache-2.0")
    assert {"mixture-of-tokens", "mot", "moe"} <= set(card.data.tags)
    size = count_parameters(model)
    assert f"{size.total:,} in total, {size.active:,} active per token" in card.text
    assert "G = 4" in card.text
    assert "E = 8" in card.text
    assert "K = 2" in card.text
    assert "| MoT layers | 2, 3; the other blocks are dense, 64 wide |" in card.text
    assert "gathered over 3 micro-batches" in card.text
    assert "Nothing was recorded about the training." in card.text
    assert not re.search(r"\n\n\n|\{\{|\{%|None\b(?! is)", card.content)


def test_the_flops_are_those_that_are_counted(tmp_path: Path) -> None:
    save(MoTForCausalLM, tmp_path)
    assert (
        f"| FLOPs | {count_flops(read_model(tmp_path).model, 64):,.0f} per token in a row of 64 (forward pass) |"
        in write_card(tmp_path).read_text()
    )


def test_a_model_without_statistics_says_so(tmp_path: Path) -> None:
    MoTForCausalLM(tiny_config()).save_pretrained(tmp_path)
    assert "**The running averages were never gathered**" in write_card(tmp_path).read_text()
    dense = MoTForCausalLM(tiny_config(mlp_layer_types=["dense"] * 4))
    dense.save_pretrained(tmp_path)
    text = write_card(tmp_path).read_text()
    assert "never gathered" not in text
    assert "| MoT layers | none; " in text


def test_a_run_leaves_a_card_with_what_it_measured(tmp_path: Path) -> None:
    MoTForCausalLM(tiny_config()).save_pretrained(tmp_path / "base")
    model = MoTForCausalLM.from_pretrained(tmp_path / "base")
    run_dir = tmp_path / "run"
    settings = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 6, "weight_decay": 0.125}
    # The rows that are evaluated are those of the first two steps, and best known after them.
    settings |= {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(model, run_dir, **settings)
    run_training(trainer, None, "random tokens")
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert min(losses, key=losses.get) == 2 < max(losses)
    card = ModelCard.load(run_dir / "README.md")
    assert card.data.eval_results[0].metric_value == pytest.approx(losses[2], abs=1e-4)
    assert card.data.eval_results[0].dataset_name == "random tokens"
    assert card.data.base_model is None
    for line in (
        "It is based on `base`.",
        "Text: random tokens.",
        "after 2 steps",
        "| steps | 6 |",
        "| weight_decay | 0.125 |",
        "| learning_rate | 0.01 |",
        f"| Loss (nats per token) | {losses[2]:.4f} |",
    ):
        assert line in card.text
    assert not (run_dir / "checkpoint-2" / "README.md").exists()
    # The same again from what lies there, with another name for the text.
    text = write_card(run_dir, text_name="dice").read_text()
    assert text == write_card(run_dir, text_name="dice").read_text()
    assert "Text: dice." in text
    assert f"| Loss (nats per token) | {losses[2]:.4f} |" in text


def test_a_run_keeps_someones_card_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "README.md").write_text("# Mine\n")
    run_training(make_trainer(MoTForCausalLM(tiny_config()), tmp_path, max_steps=1), None)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    assert "No model card was written" in caplog.text
    assert (tmp_path / "model.safetensors").is_file()


def test_a_run_of_adapters_leaves_their_own_card(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = add_lora(MoTForCausalLM(tiny_config()), rank=2, alpha=4, task_type="CAUSAL_LM")
    run_training(make_trainer(model, tmp_path, max_steps=1), None)
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "peft"
    assert not (tmp_path / "training.json").exists()
    for read in (write_card, find_run):
        with pytest.raises(ValueError, match="contains an adapter, not a model: merge it into its model"):
            read(tmp_path)


def test_only_a_card_that_was_written_here_and_not_changed_is_replaced(tmp_path: Path) -> None:
    save(MoTForCausalLM, tmp_path)
    card = write_card(tmp_path, text_name="one")
    write_card(tmp_path, text_name="two")
    written = card.read_text()
    assert "Text: two." in written
    assert is_generated(written)
    for changed in (written.replace("two", "three"), f"{written}\nMore.\n", "# Mine\n", ""):
        card.write_text(changed)
        with pytest.raises(ValueError, match=r"README.md' was written or edited by hand and is kept: use --force"):
            write_card(tmp_path)
        assert card.read_text() == changed
    write_card(tmp_path, force=True)
    assert is_generated(card.read_text())


def test_what_a_model_was_made_from_is_named(tmp_path: Path) -> None:
    save(MoTForCausalLM, tmp_path)
    card = write_card(tmp_path, base_model="someone/dense")
    assert ModelCard.load(card).data.base_model == "someone/dense"
    assert "It is based on [someone/dense](https://huggingface.co/someone/dense)." in card.read_text()
    (tmp_path / "upcycling.json").write_text(json.dumps({"source": "dense"}))
    card.unlink()
    card = write_card(tmp_path)
    assert ModelCard.load(card).data.base_model is None
    assert "It is based on `dense`." in card.read_text()


def test_what_was_given_is_kept_when_the_card_is_written_again(tmp_path: Path) -> None:
    save(MoTForCausalLM, tmp_path)
    write_record(TrainingRecord(text_name="recorded", base_model="local"), tmp_path)
    given = {"text_name": 'a --> b -- "c"', "license": "cc-by-4.0", "base_model": "someone/dense"}
    first = write_card(tmp_path, **given).read_text()
    assert write_card(tmp_path).read_text() == first
    assert is_generated(first)
    card = ModelCard.load(write_card(tmp_path, license="mit"))
    assert (card.data.license, card.data.base_model) == ("mit", "someone/dense")
    assert 'Text: a --> b -- "c".' in card.text
    pushed = address_card(card.content, "me/model")
    assert is_generated(pushed)
    (tmp_path / "README.md").write_text(pushed)
    assert ModelCard.load(write_card(tmp_path)).data.license == "mit"
    run_training(make_trainer(MoTForCausalLM(tiny_config()), tmp_path, max_steps=1), None, "trained on")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit"
    (tmp_path / "README.md").unlink()
    card = ModelCard.load(write_card(tmp_path))
    assert (card.data.license, card.data.base_model) == (None, None)
    assert "Text: trained on." in card.text


@pytest.mark.parametrize(
    ("text", "license_name"),
    [
        ("---\nlicense: gpl-3.0\n---\n# Mine\n", "gpl-3.0"),
        ("---\nlicense: [mit]\n---\n# Mine\n", "mit"),
        ("---\nlicense: []\n---\n# Mine\n", None),
        ("---\nlicense: {\n---\n# Mine\n", None),
        ("---\n- license\n---\n", None),
        ('# Mine\n<!-- given: {"license": 5, "force": "yes"} -->\n', None),
        ("<!-- given: {license} -->\n", None),
        ("", None),
    ],
)
def test_the_license_of_a_card_that_is_replaced_by_force_is_kept(
    text: str, license_name: str | None, tmp_path: Path
) -> None:
    save(MoTForCausalLM, tmp_path)
    (tmp_path / "README.md").write_text(text)
    assert ModelCard.load(write_card(tmp_path, force=True)).data.license == license_name


def test_one_of_several_licenses_must_be_given(tmp_path: Path) -> None:
    save(MoTForCausalLM, tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: [mit, gpl-3.0]\n---\n# Mine\n")
    with pytest.raises(ValueError, match=r"`license='mit, gpl-3\.0'` is not a license identifier"):
        write_card(tmp_path, force=True)
    assert ModelCard.load(write_card(tmp_path, force=True, license="mit")).data.license == "mit"


@pytest.mark.parametrize(
    ("name", "advice"),
    [("Apache-2.0", "did you mean 'apache-2.0'"), ("gpl3", "did you mean 'gpl"), ("nolic", "use 'other'")],
)
def test_a_license_that_the_hub_does_not_know_is_refused(name: str, advice: str, tmp_path: Path) -> None:
    save(MoTForCausalLM, tmp_path)
    with pytest.raises(ValueError, match=f"`license='{name}'` is not a license identifier of the Hub.*{advice}"):
        write_card(tmp_path, license=name)
    assert not (tmp_path / "README.md").exists()


def test_a_card_tells_nobody_where_files_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    secret = Path("secret")
    base = save_base(secret / "base", plain_tokenizer())
    train(
        secret / "run",
        write_text(secret / "texts"),
        model={"model_name_or_path": base},
        max_steps=1,
        eval_strategy="steps",
        eval_steps=1,
    )
    text = (secret / "run" / "README.md").read_text()
    for line in ('model_id = "run"  # this folder', "It is based on `base`.", "Text: texts."):
        assert line in text
    assert "secret" not in text
    for name in (str(tmp_path / "secret" / "base"), "secret/base", "./secret/gone", "../a/gone", "/secret/gone"):
        text = write_card(secret / "run", base_model=name).read_text()
        assert f"based on `{Path(name).name}`" in text
        assert "secret" not in text


def test_a_card_says_where_the_package_is_to_be_had(tmp_path: Path) -> None:
    save(MoTForCausalLM, tmp_path)
    assert f"pip install {metadata('mot_hf')['Name']}" in write_card(tmp_path).read_text()


def test_what_is_no_complete_model_gets_no_card(tmp_path: Path) -> None:
    save(MoTForCausalLM, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.3.mlp.experts.down_proj"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks model\.layers\.3\.mlp\.experts\.down_proj"):
        write_card(tmp_path)
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_embeddings_that_look_at_the_positions_cost_what_plain_ones_cost(kind: str, tmp_path: Path) -> None:
    head_dim = tiny_config().head_dim
    assert head_dim is not None
    pairs = head_dim // 2
    parameters = {"rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 32}
    if kind == "longrope":
        parameters |= {"short_factor": [1.0] * pairs, "long_factor": [2.0] * pairs}
    text = []
    for name, more in (("plain", {}), (kind, {"rope_parameters": {"rope_type": kind, **parameters}})):
        MoTForCausalLM(tiny_config(**more)).save_pretrained(tmp_path / name)
        text.append(write_card(tmp_path / name, model_id="x").read_text().partition("| FLOPs |")[2].split("|")[0])
    assert text[0] == text[1] != ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"hyperparameters": []}', "`hyperparameters` is \\[\\]"),
        ('{"num_processes": "2"}', "`num_processes` is '2'"),
        ('{"num_processes": true}', "`num_processes` is True"),
        ('{"text_name": 5}', "`text_name` is 5"),
        ('{"best_step": 1.5}', "`best_step` is 1.5"),
        ('{"base_model": {}}', "`base_model` is {}"),
        ('{"text": []}', "`text` is \\[\\]"),
        ('{"text": {"source": 5}}', "`source` is 5"),
        ('{"text": {"streaming": 1}}', "`streaming` is 1"),
        ('{"text": {"cache_dir": "/"}}', "`cache_dir` is '/'"),
        ('{"more": 1}', "unexpected keyword argument 'more'"),
        ("[]", "is not a JSON object"),
        ("{", "Expecting property name"),
    ],
)
def test_a_record_that_is_none_is_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text(content)
    with pytest.raises(ValueError, match=rf"training\.json' is damaged \(.*{message}.*\): delete it"):
        read_record(tmp_path)


@pytest.mark.parametrize("content", ["{}", "[]", '{"source": 5}', '{"source": null}', "{"])
def test_a_receipt_that_is_none_is_named(content: str, tmp_path: Path) -> None:
    save(MoTForCausalLM, tmp_path)
    (tmp_path / "upcycling.json").write_text(content)
    with pytest.raises(ValueError, match=r"upcycling\.json"):
        write_card(tmp_path)
    assert "dense" in write_card(tmp_path, base_model="dense").read_text()


def test_statistics_may_be_missing_and_embeddings_tied(tmp_path: Path) -> None:
    MoTForCausalLM(tiny_config(tie_word_embeddings=True)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    kept = {name: value for name, value in tensors.items() if "companions" not in name}
    save_file(kept, tmp_path / "model.safetensors")
    assert "never gathered" in write_card(tmp_path).read_text()


def test_the_command_writes_a_card(tmp_path: Path) -> None:
    save(MoTForCausalLM, tmp_path / "model")
    command = ["card", str(tmp_path / "model"), "--output", str(tmp_path / "card.md"), "--text-name", "a text"]
    result = CliRunner().invoke(app, [*command, "--license", "mit", "--base-model", "someone/dense"])
    assert result.exit_code == 0, result.output
    assert result.output == f"model card written to {tmp_path / 'card.md'}\n"
    card = ModelCard.load(tmp_path / "card.md")
    assert (card.data.license, card.data.base_model) == ("mit", "someone/dense")
    assert "Text: a text." in card.text
    (tmp_path / "card.md").write_text("mine")
    assert CliRunner().invoke(app, command).exit_code == 1
    assert CliRunner().invoke(app, [*command, "--force"]).exit_code == 0
