"""The `mot` command."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3Config
from typer.testing import CliRunner

import mot_hf.reporting
from mot_hf import MoTForCausalLM, MoTForMaskedLM
from mot_hf.calibration import calibrate
from mot_hf.cli import app, run
from mot_hf.data.blocks import make_blocks
from mot_hf.data.corpus import load_corpus
from mot_hf.data.tokenizer import train_tokenizer
from tests.models import companions_of, tiny_config, trained

TEXTS = [f"def function_{i}(a, b):\n    return a * {i} + b\n" * 10 for i in range(60)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for index, text in enumerate(TEXTS):
        (folder / f"{index}.py").write_text(text)
    return folder


def save_model(head: type[MoTForCausalLM] | type[MoTForMaskedLM], folder: Path) -> Path:
    trained(head(tiny_config(vocab_size=300))).save_pretrained(folder)
    train_tokenizer(TEXTS, vocab_size=300).save_pretrained(folder)
    return folder


def run_calibrate(model_dir: Path, source: Path, *arguments: str) -> None:
    command = ["calibrate", str(model_dir), "--source", str(source), "--num-batches", "5", "--block-length", "16"]
    result = CliRunner().invoke(app, [*command, *arguments])
    assert result.exit_code == 0, result.output
    assert "calibrated model saved in" in result.output


def test_calibrate_saves_a_copy_with_exact_statistics(source: Path, tmp_path: Path) -> None:
    model_dir, output_dir = save_model(MoTForCausalLM, tmp_path / "model"), tmp_path / "calibrated"
    run_calibrate(model_dir, source, "--output-dir", str(output_dir))
    expected, actual = MoTForCausalLM.from_pretrained(model_dir), MoTForCausalLM.from_pretrained(output_dir)
    rows = make_blocks(load_corpus(source), train_tokenizer(TEXTS, 300), block_length=16, group_size=4)["train"]
    batches = torch.tensor(rows[:20]["input_ids"]).split(4)
    calibrate(expected, [{"input_ids": ids} for ids in batches], show_progress=False)
    torch.testing.assert_close(actual.state_dict(), expected.state_dict())
    assert (output_dir / "tokenizer.json").exists()


def test_calibrate_works_in_place_on_a_masked_language_model(source: Path, tmp_path: Path) -> None:
    model_dir = save_model(MoTForMaskedLM, tmp_path / "model")
    before = MoTForMaskedLM.from_pretrained(model_dir)
    run_calibrate(model_dir, source)
    after = MoTForMaskedLM.from_pretrained(model_dir)
    assert all(map(torch.equal, before.parameters(), after.parameters()))
    statistics = companions_of(after)
    assert not any(torch.equal(value, statistics[name]) for name, value in companions_of(before).items())


@pytest.mark.parametrize("head", [MoTForCausalLM, MoTForMaskedLM])
def test_report_writes_a_page_into_the_run(
    head: type[MoTForCausalLM] | type[MoTForMaskedLM], source: Path, tmp_path: Path
) -> None:
    run_dir = save_model(head, tmp_path / "run")
    state = {"global_step": 7, "max_steps": 7, "log_history": [{"step": 7, "loss": 4.125, "learning_rate": 0.1}]}
    (run_dir / "checkpoint-7").mkdir()
    (run_dir / "checkpoint-7" / "trainer_state.json").write_text(json.dumps(state))
    result = CliRunner().invoke(app, ["report", str(run_dir), "--source", str(source), "--num-batches", "1"])
    assert result.exit_code == 0, result.output
    page = " ".join((run_dir / "report.html").read_text().split())
    assert "4 validation rows of 64 tokens" in page  # what the tiny model is meant for
    assert "4.1250" in page
    assert head.__name__ in page


def test_report_of_a_checkpoint_into_another_file(source: Path, tmp_path: Path) -> None:
    save_model(MoTForCausalLM, tmp_path / "run" / "checkpoint-7")
    output = tmp_path / "page.html"
    command = ["report", str(tmp_path / "run"), "--source", str(source), "--block-length", "16"]
    result = CliRunner().invoke(app, [*command, "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert "rows of 16 tokens" in " ".join(output.read_text().split())
    assert not (tmp_path / "run" / "report.html").exists()


def fail(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr("sys.argv", ["mot", *arguments])
    with pytest.raises(SystemExit, match="1"):
        run()
    return capsys.readouterr().err


@pytest.mark.parametrize("command", ["calibrate", "report"])
def test_what_the_user_can_mend_is_reported_without_a_traceback(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Qwen3Config(vocab_size=97).save_pretrained(tmp_path / "dense")
    save_file({"x": torch.zeros(1)}, tmp_path / "dense" / "model.safetensors")
    MoTForCausalLM(tiny_config()).save_pretrained(tmp_path / "untold")
    (tmp_path / "empty").mkdir()
    for folder, message in (
        ("dense", "holds a model of type 'qwen3', not 'mot'"),
        ("untold", "untold' holds no tokenizer: save it there"),
        ("empty", "config.json"),
    ):
        error = fail([command, str(tmp_path / folder)], monkeypatch, capsys)
        assert "error: " in error
        assert "Traceback" not in error
        assert message in error


def test_a_folder_that_is_no_run_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is no training run" in fail(["report", str(tmp_path)], monkeypatch, capsys)
    assert "absent' is no folder" in fail(["report", str(tmp_path / "absent")], monkeypatch, capsys)


@pytest.mark.parametrize("command", ["report", "card", "calibrate", "export", "push"])
def test_an_error_is_one_line_without_control_characters(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a\x1b]0;owned\x07\nb"
    MoTForCausalLM(tiny_config()).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["\x1b[31m\n\x9b2J"]}))
    error = fail([command, str(folder), *{"export": ["x"], "push": ["a/b"]}.get(command, [])], monkeypatch, capsys)
    assert error.count("\n") == 1
    assert error.strip().isprintable()
    assert r"\x1b[31m\n\x9b2J" in error


def test_a_missing_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mot_hf, "reporting", mot_hf.reporting)  # so that the one of now is put back
    for name in [name for name in sys.modules if name.startswith("mot_hf.reporting")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "matplotlib" in fail(["report", str(tmp_path)], monkeypatch, capsys)


def test_help_names_the_commands() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for name in ("calibrate", "report", "card", "push", "upcycle", "export", "serve"):
        assert f" {name} " in result.output
