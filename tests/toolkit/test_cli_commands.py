"""The commands of `mot` that train a model and use it."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mot_cli import app, run
from mot_cli.application import print_result, take_debug
from mot_hf import MoTForCausalLM, MoTForMaskedLM, MoTForSequenceClassification
from mot_hf.data.corpus import load_groups
from mot_hf.data.run_text import warn_of_long_rows
from mot_hf.data.tokenizer import train_tokenizer
from mot_hf.sizes import count_parameters
from mot_hf.storage.saved_model import open_model
from mot_hf.training import RunPlan
from tests.models import tiny_config, trained
from tests.scripts.running import environment_of
from tests.training.language_runs import TEXTS, write_text

SMALL = ["--hidden_size", "32", "--num_attention_heads", "2", "--intermediate_size", "64", "--num_hidden_layers", "2"]
SMALL += ["--group_size", "4", "--num_experts", "8", "--vocab_size", "300", "--block_length", "12"]
SMALL += ["--per_device_train_batch_size", "8", "--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true"]


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    trained(MoTForCausalLM(tiny_config(vocab_size=300))).save_pretrained(folder)
    train_tokenizer(TEXTS, vocab_size=300).save_pretrained(folder)
    return folder


def invoke(*arguments: str | int | Path) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def fail(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr("sys.argv", ["mot", *arguments])
    with pytest.raises(SystemExit, match="1"):
        run()
    return capsys.readouterr().err


@pytest.mark.parametrize(("masked", "head"), [("false", MoTForCausalLM), ("true", MoTForMaskedLM)])
def test_train_leaves_a_model_that_the_other_commands_take(masked: str, head: type, tmp_path: Path) -> None:
    source, output = write_text(tmp_path / "text"), tmp_path / "run"
    arguments = ["--source", source, "--output_dir", output, "--masked", masked, "--max_steps", "2"]
    assert f"model saved in {output}" in invoke("train", *SMALL, *arguments)
    assert isinstance(open_model(output)[0], head)
    facts = json.loads(invoke("inspect", output, "--json"))
    assert (facts["class"], facts["statistics"], facts["trained on"]) == (head.__name__, "of 2 batches", "text")
    rows = json.loads(invoke("evaluate", output, "--source", source, "--num-batches", "1", "--json"))
    assert [row["mode"] for row in rows] == ["cross_example", "per_sequence", "moe"]


def test_transition_tunes_a_model(model_dir: Path, tmp_path: Path) -> None:
    arguments = ["--source", write_text(tmp_path / "text"), "--max_steps", "2", "--block_length", "12"]
    arguments += ["--per_device_train_batch_size", "8", "--report_to", "none", "--use_cpu", "true"]
    invoke("transition", "--model_name_or_path", model_dir, "--output_dir", tmp_path / "moe", *arguments)
    assert MoTForCausalLM.from_pretrained(tmp_path / "moe").config.inference_mixing == "moe"


def test_finetune_classifies_rows(model_dir: Path, tmp_path: Path) -> None:
    rows = [{"text": text, "label": number % 2} for number, text in enumerate(TEXTS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--source", tmp_path / "rows.jsonl", "--output_dir", tmp_path / "run", "--max_steps", "1"]
    arguments += ["--per_device_train_batch_size", "8", "--report_to", "none", "--use_cpu", "true"]
    invoke("finetune", "--model_name_or_path", model_dir, *arguments)
    assert isinstance(open_model(tmp_path / "run")[0], MoTForSequenceClassification)
    assert "eval_accuracy" in json.loads((tmp_path / "run" / "eval_results.json").read_text())


def test_sft_tunes_on_conversations(model_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    rows = [{"question": text[:20], "answer": text[:9]} for text in TEXTS]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--source", tmp_path / "rows.jsonl", "--prompt_column", "question", "--completion_column", "answer"]
    arguments += ["--model_name_or_path", model_dir, "--output_dir", tmp_path / "run", "--max_steps", "1"]
    arguments += ["--report_to", "none", "--use_cpu", "true"]
    assert f"model saved in {tmp_path / 'run'}" in invoke("sft", "sft", *arguments)
    model, tokenizer = open_model(tmp_path / "run")
    assert isinstance(model, MoTForCausalLM)
    assert tokenizer.chat_template is not None
    result = CliRunner().invoke(app, ["sft", "sft", "--model_name_or_path", "x", "--lerning_rate", "1"])
    assert "no argument `--lerning_rate` (did you mean `--learning_rate`?)" in str(result.exception)


def test_evaluate_measures_every_mode(model_dir: Path, tmp_path: Path) -> None:
    source = write_text(tmp_path / "text")
    rows = json.loads(
        invoke("evaluate", model_dir, "--source", source, "--block-length", "16", "--num-batches", "1", "--json")
    )
    model, tokenizer = open_model(model_dir)
    (batch,) = load_groups(tokenizer, source, "validation", group_size=4, block_length=16, num_groups=1)
    for row in rows:
        with torch.no_grad():
            output = model(**batch, mixing=row["mode"])
        assert row["loss"] == pytest.approx(output.loss.item(), rel=1e-5)
        best = output.logits[:, :-1].argmax(-1)
        assert row["accuracy"] == pytest.approx((best == batch["labels"][:, 1:]).float().mean().item())
    table = invoke("evaluate", model_dir, "--source", source, "--block-length", "16", "--num-batches", "1")
    assert "the first 4 rows of 16 tokens of the held-out part of text" in table
    assert [line.split()[0] for line in table.splitlines()[-4:]] == ["mode", "cross_example", "per_sequence", "moe"]


@pytest.mark.parametrize("command", ["evaluate", "calibrate", "report"])
def test_rows_of_one_token_are_refused(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["mot", command, str(tmp_path), "--block-length", "1"])
    with pytest.raises(SystemExit, match="2"):
        run()
    assert "--block-length" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "calibrate"])
def test_rows_longer_than_the_model_is_meant_for_are_told_once(
    command: str, model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_long_rows.cache_clear()
    source = write_text(tmp_path / "text", TEXTS * 4)
    with caplog.at_level(logging.WARNING, logger="mot_hf.data.run_text"):
        for length in (64, 65):  # the model's maximum is 64
            assert not caplog.records
            copy = ["--output-dir", tmp_path / str(length), "--force"] if command == "calibrate" else []
            invoke(command, model_dir, *copy, "--source", source, "--num-batches", 1, "--block-length", length)
    assert [record.getMessage() for record in caplog.records] == [
        "Rows of `block_length=65` tokens are longer than the model is meant for: set --block-length to 64 or less."
    ]


def test_generate_continues_a_text(model_dir: Path) -> None:
    model, tokenizer = open_model(model_dir)
    inputs = tokenizer("the fox", return_tensors="pt")
    ids = model.generate(inputs["input_ids"], max_new_tokens=8, do_sample=False, mixing="moe")
    expected = tokenizer.decode(ids[0], skip_special_tokens=True)
    printed = invoke("generate", model_dir, "the fox", "--max-new-tokens", "8", "--greedy", "--mixing", "moe")
    assert printed.strip().endswith(expected.strip())
    sampled = [invoke("generate", model_dir, "the fox", "--seed", seed, "--max-new-tokens", "8") for seed in "112"]
    assert sampled[0] == sampled[1] != sampled[2]


def test_a_model_of_another_kind_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for head in (MoTForMaskedLM, MoTForSequenceClassification):
        head(tiny_config(vocab_size=300)).save_pretrained(tmp_path / head.__name__)
        train_tokenizer(TEXTS, vocab_size=300).save_pretrained(tmp_path / head.__name__)
    error = fail(["generate", str(tmp_path / "MoTForMaskedLM"), "x"], monkeypatch, capsys)
    assert "is a MoTForMaskedLM, which cannot continue a text" in error
    error = fail(["evaluate", str(tmp_path / "MoTForSequenceClassification")], monkeypatch, capsys)
    assert "is a MoTForSequenceClassification, not a language model" in error


def test_inspect_shows_a_model_and_refuses_a_damaged_one(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = invoke("inspect", model_dir)
    size = count_parameters(MoTForCausalLM.from_pretrained(model_dir))
    lines = dict(line.split("  ", maxsplit=1) for line in shown.splitlines())
    assert lines["parameters"].strip() == str(size.total)
    assert lines["training"].strip() == "unknown: there is no training.json"
    weights = load_file(model_dir / "model.safetensors")
    weights["lm_head.weight"][0, 0] = torch.nan
    save_file(weights, model_dir / "model.safetensors", {"format": "pt"})
    error = fail(["inspect", str(model_dir)], monkeypatch, capsys)
    assert "lm_head.weight" in error
    assert "NaN" in error


def test_inspect_tells_statistics_that_were_never_gathered(model_dir: Path) -> None:
    MoTForCausalLM(tiny_config(vocab_size=300)).save_pretrained(model_dir)
    assert "not gathered" in json.loads(invoke("inspect", model_dir, "--json"))["statistics"]


def test_estimate_takes_what_train_takes() -> None:
    arguments = ["--per_device_train_batch_size", "4", "--block_length", "16", "--bf16", "true", "--tflops", "1"]
    rows = {row["quantity"]: row for row in json.loads(invoke("estimate", "small_clm", *arguments, "--json"))}
    assert rows["parameters"] == {"quantity": "parameters", "value": pytest.approx(10.53, abs=0.01), "unit": "million"}
    assert rows["tokens of a step"]["value"] == 64
    assert invoke("estimate", "small_clm", *arguments).splitlines()[0].split() == ["quantity", "value", "unit"]


def test_recipes_are_listed() -> None:
    (small,) = [row for row in json.loads(invoke("recipes", "--json")) if row["name"] == "small_clm"]
    assert small["million_parameters"] == 10.5
    assert invoke("recipes").splitlines()[0].split() == [
        *("name", "million", "parameters", "million", "active", "mflops", "per", "token", "training", "gb", "about")
    ]


def test_the_help_of_train_is_that_of_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    shown = invoke("train", "--help")
    assert shown.startswith("usage: mot train [RECIPE] [--name value ...]")
    assert "--companion_momentum" in shown


def test_debug_shows_the_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "error: There is no argument `--nosuch`" in fail(["train", "--nosuch", "1"], monkeypatch, capsys)
    monkeypatch.setattr("sys.argv", ["mot", "train", "--nosuch", "1", "--debug"])
    with pytest.raises(ValueError, match="no argument `--nosuch`"):
        run()


@pytest.mark.parametrize(
    ("words", "is_there", "rest"),
    [
        (["train", "--debug"], True, ["train"]),
        (["train", "--debug", "--seed", "1"], True, ["train", "--seed", "1"]),
        (["train", "--debug", "underflow_overflow"], False, ["train", "--debug", "underflow_overflow"]),
        (["train"], False, ["train"]),
    ],
)
def test_debug_with_a_value_belongs_to_the_trainer(words: list[str], is_there: bool, rest: list[str]) -> None:
    assert take_debug(words) == is_there
    assert words == rest


def test_what_is_no_number_is_null_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_result([{"loss": float("nan"), "rest": [1.5, float("inf"), "nan"]}], as_json=True)
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == [
        {"loss": None, "rest": [1.5, None, "nan"]}
    ]


def test_quiet_prints_nothing_but_the_result(model_dir: Path, tmp_path: Path) -> None:
    source = write_text(tmp_path / "text")
    command = ["evaluate", str(model_dir), "--source", source, "--block-length", "16", "--json"]
    code = "import sys; from mot_cli import run; sys.argv = ['mot', *sys.argv[1:]]; run()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--quiet", *command],
        cwd=tmp_path, env=environment_of(tmp_path), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert [row["mode"] for row in json.loads(done.stdout)] == ["cross_example", "per_sequence", "moe"]
    assert done.stderr == ""


def test_train_without_a_word_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "needs a recipe, as in `mot train small_clm`" in fail(["train"], monkeypatch, capsys)


def test_an_interrupted_command_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: RunPlan, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RunPlan, "on_step_end", interrupt)
    arguments = ["--source", write_text(tmp_path / "text"), "--output_dir", str(tmp_path / "run"), "--max_steps", "4"]
    result = CliRunner().invoke(app, ["train", *SMALL, *arguments])
    assert result.exit_code == 130
    assert "interrupted at step 1 of 4: there is no checkpoint yet, so repeat the command" in result.output


def test_generate_ends_at_the_length_of_the_model(model_dir: Path) -> None:
    printed = invoke("generate", model_dir, "the fox", "--greedy", "--max-new-tokens", "500")
    assert "tokens more: the model is meant for 64" in printed


def test_a_prompt_that_is_not_utf8_is_refused(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "`prompt` is not UTF-8" in fail(["generate", str(model_dir), "word \udce9"], monkeypatch, capsys)
