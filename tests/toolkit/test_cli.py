"""The `mot` command."""

import json
import re
import shutil
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config
from typer.testing import CliRunner

import mot_hf
from mot_cli import EXTRAS, app, run
from mot_hf import MoTForCausalLM, MoTForMaskedLM, MoTForTokenClassification
from mot_hf.calibration import calibrate
from mot_hf.data.blocks import make_blocks
from mot_hf.data.corpus import load_corpus
from mot_hf.data.tokenizer import train_tokenizer
from mot_hf.storage.record import TrainingRecord, write_record
from mot_hf.training import CorpusArguments
from tests.conversion.test_upcycle import save_dense
from tests.models import companions_of, tiny_config, trained
from tests.scripts.running import run_python

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
    command.append("--force")  # weights of no training: the loss may rise
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


def test_calibrate_shows_the_loss_and_refuses_to_raise_it(source: Path, tmp_path: Path) -> None:
    model_dir, tokenizer = save_model(MoTForCausalLM, tmp_path / "model"), train_tokenizer(TEXTS, 300)
    rows = make_blocks(load_corpus(source), tokenizer, block_length=16, group_size=4)
    held_out = torch.tensor(rows["validation"]["input_ids"][:])
    # Trained against the statistics of random tokens, so that those of text do harm.
    model = MoTForCausalLM.from_pretrained(model_dir).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for ids in torch.tensor(rows["train"]["input_ids"][:]).split(16)[:30]:
        model(ids, labels=ids, mixing="per_sequence").loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(model_dir)
    command = ["calibrate", str(model_dir), "--source", str(source), "--num-batches", "5", "--block-length", "16"]

    def loss(folder: Path) -> float:
        with torch.no_grad():
            return MoTForCausalLM.from_pretrained(folder).eval()(held_out, labels=held_out).loss.item()

    before, weights = loss(model_dir), (model_dir / "model.safetensors").read_bytes()
    refused = str(CliRunner().invoke(app, command).exception)
    measured = re.search(r"raise the loss from (\d\.\d{4}) to (\d\.\d{4}), so nothing was saved", refused)
    assert measured
    assert (model_dir / "model.safetensors").read_bytes() == weights
    result = CliRunner().invoke(app, [*command, "--force"])
    assert result.exit_code == 0, result.output
    assert f"text in mode per_sequence: {measured[1]} before, {measured[2]} after" in result.output
    assert [float(value) for value in measured.groups()] == pytest.approx([before, loss(model_dir)], abs=2e-4)
    assert loss(model_dir) > before + 1e-3


def test_calibrate_lowers_the_loss_of_a_model_with_wrong_statistics(source: Path, tmp_path: Path) -> None:
    model_dir = save_model(MoTForCausalLM, tmp_path / "model")
    tensors = load_file(model_dir / "model.safetensors")
    for name, value in tensors.items():
        if name.endswith("mean_output"):
            value.normal_(std=100)
    save_file(tensors, model_dir / "model.safetensors", {"format": "pt"})
    command = ["calibrate", str(model_dir), "--source", str(source), "--num-batches", "5", "--block-length", "16"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    measured = re.search(r"per_sequence: ([\d.]+) before, ([\d.]+) after", result.output)
    assert measured
    assert float(measured[1]) > float(measured[2]) + 0.05


def test_calibrate_without_a_loss_to_compare(source: Path, tmp_path: Path) -> None:
    model_dir = save_model(MoTForCausalLM, tmp_path / "model")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.txt").write_text("".join(TEXTS))
    (tmp_path / "rows" / "test.txt").write_text("too short")
    command = ["calibrate", str(model_dir), "--source", str(tmp_path / "rows"), "--num-batches", "2"]
    refused = str(CliRunner().invoke(app, command).exception)
    assert re.search(r"loss cannot be measured: .*shorter than .*--force calibrates without it", refused)
    result = CliRunner().invoke(app, [*command, "--force"])
    assert result.exit_code == 0
    assert "the loss is not measured: " in result.output
    trained(MoTForTokenClassification(tiny_config(vocab_size=300))).save_pretrained(model_dir)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0
    assert "MoTForTokenClassification is no language model: its loss is not measured" in result.output


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


@pytest.fixture
def run_dir(source: Path, tmp_path: Path) -> Path:
    """An untuned model whose record says that it was trained on `source`."""
    folder = save_model(MoTForCausalLM, tmp_path / "run")
    write_record(TrainingRecord(text=CorpusArguments(source=str(source)).text()), folder)
    return folder


def test_commands_take_the_text_of_the_run(source: Path, run_dir: Path, tmp_path: Path) -> None:
    calibrate_to = ["calibrate", str(run_dir), "--num-batches", "2", "--force", "--output-dir"]
    outputs = {}
    for name, options in (("own", []), ("named", ["--source", str(source)])):
        result = CliRunner().invoke(app, [*calibrate_to, str(tmp_path / name), *options])
        assert result.exit_code == 0, result.output
        outputs[name] = load_file(tmp_path / name / "model.safetensors")
    torch.testing.assert_close(outputs["own"], outputs["named"], rtol=0, atol=0)
    assert CliRunner().invoke(app, ["report", str(run_dir)]).exit_code == 0
    assert re.search(r"validation\s+rows\s+of\s+64\s+tokens\s+from\s+text\b", (run_dir / "report.html").read_text())
    error = CliRunner().invoke(app, ["export", str(run_dir), str(tmp_path / "exported")]).exception
    assert "Its loss on validation text of text is" in str(error)


def test_commands_name_a_text_of_the_run_that_is_gone(
    source: Path, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source.rename(tmp_path / "moved")
    dense_dir = save_dense(tmp_path / "dense")
    shutil.copy(run_dir / "training.json", dense_dir)
    new = str(tmp_path / "new")
    sizes = ["--group-size", "4", "--num-experts", "8"]
    for command in (["calibrate", str(run_dir)], ["report", str(run_dir)], ["export", str(run_dir), new],
                    ["upcycle", str(dense_dir), new, *sizes]):  # fmt: skip
        error = fail(command, monkeypatch, capsys)
        assert re.search(r"`source='.*/text'`.* was trained on this text: name other text with --source", error)


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
        ("dense", "contains a model of type 'qwen3', not 'mot'"),
        ("untold", "untold' has no tokenizer: save it there"),
        ("empty", "config.json"),
    ):
        error = fail([command, str(tmp_path / folder)], monkeypatch, capsys)
        assert "error: " in error
        assert "Traceback" not in error
        assert message in error


def test_a_folder_that_is_no_run_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is not a training run" in fail(["report", str(tmp_path)], monkeypatch, capsys)
    assert "absent' is not a folder" in fail(["report", str(tmp_path / "absent")], monkeypatch, capsys)


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


def test_a_missing_extra_is_named_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "mot_cli.application.find_spec", lambda name: None if name in ("matplotlib", "datasets") else name
    )
    error = fail(["report", str(tmp_path / "absent")], monkeypatch, capsys)
    assert error == (
        'error: `mot report` needs datasets, matplotlib, not installed here: pip install "mot_hf[train,report]"\n'
    )
    assert 'matplotlib, not installed here: pip install "mot_hf[report]"' in fail(["card", "x"], monkeypatch, capsys)
    monkeypatch.setattr("mot_cli.application.find_spec", lambda name: None if name == "trl" else name)
    error = fail(["sft", "sft", "--model_name_or_path", "absent"], monkeypatch, capsys)
    assert error == 'error: `mot sft` needs trl, not installed here: pip install "mot_hf[sft]"\n'
    monkeypatch.setattr(
        "mot_cli.application.find_spec", lambda name: None if name in ("matplotlib", "datasets") else name
    )
    MoTForCausalLM(tiny_config()).save_pretrained(tmp_path / "untuned")
    error = fail(["export", str(tmp_path / "untuned"), str(tmp_path / "moe")], monkeypatch, capsys)
    assert "was not tuned in mode 'moe'" in error
    assert 'datasets, not installed here: pip install "mot_hf[train]" --force exports it as it is' in error


WITHOUT = """
import sys
sys.modules.update(dict.fromkeys({modules!r}))
import mot_cli
mot_cli.app({arguments!r}, standalone_mode=False)
import {imports}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "extras", "imports"),
    [
        (["export", "tuned", "exported"], [], "mot_hf.metrics"),
        (
            ["calibrate", "tuned", "--source", "text", "--num-batches", "2", "--block-length", "16", "--force"],
            ["train"],
            "mot_hf.conversion.upcycle, mot_hf.reporting.mixing_probe",
        ),
        (["card", "tuned"], ["report"], "mot_hf.reporting.figures"),
    ],
)
def test_a_command_works_with_the_extras_that_it_names(
    arguments: list[str], extras: list[str], imports: str, source: Path, tmp_path: Path
) -> None:
    model_dir = save_model(MoTForCausalLM, tmp_path / "tuned")
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(config | {"mixing": "moe"}))
    modules = [module for extra, of_extra in EXTRAS.items() if extra not in extras for module in of_extra]
    modules += [] if "train" in extras else ["peft"]  # which needs accelerate
    run_python(tmp_path, "-c", WITHOUT.format(modules=modules, arguments=arguments, imports=imports))


def test_help_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    code = (
        "import sys, mot_cli; mot_cli.app(['push', '--help'], standalone_mode=False); print(*sys.modules, sep='\\n')"
    )
    printed = run_python(tmp_path, "-c", code).split()
    assert "Usage:" in printed
    assert "typer" in printed
    assert not {"torch", "transformers", "mot_hf", "numpy"} & set(printed)


def test_extras_are_those_of_the_distribution() -> None:
    wanted = [Requirement(line) for line in requires("mot_hf") or () if "extra ==" in line]
    names = {
        extra: {one.name for one in wanted if one.marker and one.marker.evaluate({"extra": extra})} for extra in EXTRAS
    }
    assert set(EXTRAS["train"]) <= names["train"]
    assert set(EXTRAS["report"]) <= names["report"]
    assert names["serve"] == {"transformers"}
    assert names["sft"] == set(EXTRAS["sft"])


def test_the_precision_is_that_of_the_computation_only(source: Path, tmp_path: Path) -> None:
    model_dir = save_model(MoTForCausalLM, tmp_path / "model")
    copies = {dtype: tmp_path / dtype for dtype in ("auto", "float32", "bfloat16")}
    for dtype, folder in copies.items():
        run_calibrate(model_dir, source, "--output-dir", str(folder), "--dtype", dtype, "--device", "cpu")
    weights = {dtype: load_file(folder / "model.safetensors") for dtype, folder in copies.items()}
    assert json.loads((copies["bfloat16"] / "config.json").read_text())["dtype"] == "float32"
    for name, exact in weights["float32"].items():
        assert torch.equal(weights["auto"][name], exact)
        rough = weights["bfloat16"][name]
        assert rough.dtype == exact.dtype
        if name.endswith(("mean_input", "mean_output")):
            assert not torch.equal(rough, exact)
            torch.testing.assert_close(rough, exact, rtol=0.1, atol=0.02)
        elif ".companions." not in name:
            assert torch.equal(rough, exact)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
@pytest.mark.parametrize("command", ["calibrate", "report"])
def test_a_device_that_is_not_there_is_refused(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model_dir = save_model(MoTForCausalLM, tmp_path / "model")
    assert "`device='cuda'` cannot be used" in fail([command, str(model_dir), "--device", "cuda"], monkeypatch, capsys)


def test_help_names_the_commands() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for name in ("calibrate", "report", "card", "push", "upcycle", "export", "serve"):
        assert f" {name} " in result.output


def test_the_version_is_printed() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"{mot_hf.__version__}\n")


@pytest.mark.slow
def test_the_package_runs_as_a_command(tmp_path: Path) -> None:
    assert run_python(tmp_path, "-m", "mot_hf", "--version") == f"{mot_hf.__version__}\n"
    assert "small_clm" in run_python(tmp_path, "-m", "mot_hf", "recipes")
