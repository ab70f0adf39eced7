"""The check on a GPU: parts that fail, hang or lack something cost no more than themselves, and a dry run on a CPU."""

import json
import subprocess
import sys
import time
import zipfile
from dataclasses import fields
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from scripts.benchmarks.gpu import checks, layer, run, training
from scripts.benchmarks.gpu import record as recording
from tests.scripts.running import REPOSITORY, environment_of

RESULTS = REPOSITORY / "scripts" / "benchmarks" / "gpu" / "results"
OPTIONS = ["--device", "--scale", "--deadline", "--output_dir", "--command"]

# What every fake part begins with: it stores one case.
STORE = """
import json, sys, time
from pathlib import Path
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
path = Path(arguments["--output_dir"]) / (Path(__file__).stem + ".json")
path.write_text(json.dumps({"cases": [{"name": "first", "outcome": "measured"}], "arguments": arguments}))
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(run, "GRACE", 0.5)
    return run


@pytest.fixture
def parts() -> SimpleNamespace:
    """The modules of the real parts."""
    return SimpleNamespace(record=recording, checks=checks, layer=layer, training=training)


def fake(script: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, bodies: dict[str, str]) -> None:
    """Replace the parts by scripts of these bodies."""
    for name, body in bodies.items():
        (folder / f"{name}.py").write_text(body)
    monkeypatch.setattr(script, "PARTS", {name: folder / f"{name}.py" for name in bodies})


def make_arguments(script: ModuleType, folder: Path, **changes: Any) -> Any:
    return script.Arguments(**({"device": "cpu", "output_dir": str(folder / "out"), "parts": []} | changes))


def make_record(parts: SimpleNamespace, folder: Path, seconds: float = 60.0) -> Any:
    args = parts.record.PartArguments("cpu", 0.1, time.time() + seconds, str(folder), "the command")
    return parts.record.Record("part", args)


def load(folder: Path, part: str) -> dict[str, Any]:
    return json.loads((folder / f"{part}.json").read_text())


def test_a_part_that_crashes_or_hangs_leaves_the_others_and_its_own_results(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deaf = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    child = "import subprocess\nsubprocess.Popen(['sleep', '7351'])\n"
    bodies = {
        "checks": STORE + "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        "layer": STORE + deaf + child + "print('sleeping', flush=True); time.sleep(60)",
        "model": "raise ModuleNotFoundError('No module named datasets')",
        "training": STORE,
    }
    fake(script, monkeypatch, tmp_path, bodies)
    start = time.monotonic()
    assert script.main(make_arguments(script, tmp_path, parts=list(bodies), seconds=60.0, layer_seconds=6.0)) == 1
    assert time.monotonic() - start < 40
    for part in ("checks", "layer", "training"):
        assert load(tmp_path / "out", part)["cases"] == [{"name": "first", "outcome": "measured"}]
    assert not (tmp_path / "out" / "model.json").exists()
    printed = capsys.readouterr().out
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert summary in printed
    lines = summary.splitlines()
    assert lines[0].startswith("checks    1 measured; ")
    assert lines[0].endswith(", exit code -11")
    assert lines[1].startswith("layer     1 measured; stopped at its limit of ")
    assert lines[2].startswith("model     wrote nothing; ")
    assert lines[3].startswith("training  1 measured; ")
    assert "No module named datasets" in summary
    assert "sleeping" in (tmp_path / "out" / "log.txt").read_text()
    assert subprocess.run(["pgrep", "-f", "^sleep 7351$"], capture_output=True).returncode == 1


def test_every_part_is_told_what_is_left_of_the_time(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake(script, monkeypatch, tmp_path, {"layer": STORE + "time.sleep(2)", "training": STORE})
    now = time.time()
    args = make_arguments(script, tmp_path, parts=["training", "layer"], seconds=60.0, layer_seconds=20.0, scale=0.5)
    assert script.main(args) == 0
    told = {part: load(tmp_path / "out", part)["arguments"] for part in ("layer", "training")}
    assert list(told["layer"]) == OPTIONS
    assert told["layer"]["--scale"] == "0.5"
    assert float(told["layer"]["--deadline"]) == pytest.approx(now + 20 - 2 * script.GRACE, abs=5)
    assert float(told["training"]["--deadline"]) == pytest.approx(now + 60 - 2 * script.GRACE, abs=5)


def test_results_of_an_earlier_run_are_not_taken_for_new_ones(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake(script, monkeypatch, tmp_path, {"layer": STORE, "model": STORE})
    args = make_arguments(script, tmp_path, parts=["layer"], seconds=10.0)
    (tmp_path / "out").mkdir()
    for part in ("layer", "model"):
        (tmp_path / "out" / f"{part}.json").write_text('{"cases": [{"name": "old", "outcome": "measured"}]}')
    (tmp_path / "layer.py").write_text("")
    assert script.main(args) == 1
    assert not (tmp_path / "out" / "layer.json").exists()
    assert load(tmp_path / "out", "model")["cases"][0]["name"] == "old"


@pytest.mark.parametrize(
    ("part", "cases", "num_missing", "failed"),
    [
        ("checks", ["passed", "skipped"], 0, False),
        ("checks", ["passed", "failed"], 0, True),
        ("checks", ["passed"], 1, True),
        ("layer", ["measured", "failed", "left out"], 0, False),
        ("layer", [], 0, True),
    ],
)
def test_only_checks_that_do_not_pass_and_parts_without_results_fail(
    script: ModuleType, part: str, cases: list[str], num_missing: int, failed: bool
) -> None:
    outcome = script.Outcome(part, "5 s", [{"name": "a", "outcome": outcome} for outcome in cases], num_missing)
    assert outcome.failed is failed
    assert all(word in outcome.describe() for word in cases)


def test_without_a_gpu_there_is_one_line_and_exit_code_2(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main(script.Arguments(output_dir=str(tmp_path / "out"))) == 2
    assert capsys.readouterr().out.startswith("No GPU: torch ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parts": ["layers"]}, "`parts` has 'layers', which must be one of checks, layer, model, training"),
        ({"scale": 0.0}, "`scale=0.0` and `seconds=300.0` must be greater than 0"),
        ({"output_dir": str(RESULTS / "cpu")}, "is for the results of a GPU"),
        ({"wheels": "no_such_folder"}, r"`wheels='no_such_folder'` holds no file \*.whl"),
    ],
)
def test_what_cannot_be_run_is_refused(script: ModuleType, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        script.Arguments(**({"device": "cpu"} | arguments))


def test_defaults_are_eight_minutes_of_a_gpu_and_five_of_a_cpu(script: ModuleType) -> None:
    gpu, cpu = script.Arguments(), script.Arguments(device="cpu")
    assert (gpu.seconds, cpu.seconds) == (480, 300)
    assert Path(gpu.output_dir) == RESULTS
    assert cpu.output_dir == "runs/gpu"
    assert [gpu.limit(part) for part in gpu.parts] == [110, 120, 60, 480]


def test_parts_import_the_package_and_wheels_that_nobody_installed(script: ModuleType, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "VALUE = 5")
        wheel.writestr("carried-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n")
        wheel.writestr("carried-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("carried-1.0.dist-info/RECORD", "")
    args = make_arguments(script, tmp_path, wheels=str(wheels))
    environment = script.make_environment(tmp_path / "site", args)
    for name in ("modeling/__init__.py", "training/__init__.py", "py.typed"):
        assert (tmp_path / "site" / "links" / "mot_hf" / name).is_file()
    origins = "*(find_spec(name).origin for name in ('mot_hf', 'tests'))"
    code = f"import carried; from importlib.util import find_spec; print(carried.VALUE, {origins})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [tmp_path / "site" / "links" / "mot_hf", REPOSITORY / "tests"]
    assert done.stdout.split() == ["5", *(str(folder / "__init__.py") for folder in found)]


def test_cases_are_stored_one_by_one_with_their_errors(parts: SimpleNamespace, tmp_path: Path) -> None:
    record = make_record(parts, tmp_path)

    def fail() -> dict[str, Any]:
        assert load(tmp_path, "part")["cases"] == [{"name": "good", "outcome": "measured", "value": 1}]
        raise ValueError("too large")

    record.measure("good", "any", 5.0, lambda: {"value": 1})
    record.measure("bad", "any", 5.0, fail)
    record.measure("good too", "any", 5.0, dict)
    stored = load(tmp_path, "part")
    assert [case["outcome"] for case in stored["cases"]] == ["measured", "failed", "measured"]
    assert stored["cases"][1]["error"] == "ValueError: too large"
    assert "in fail" in stored["cases"][1]["traceback"]
    assert stored["command"] == "the command"
    assert stored["machine"]["device"]
    assert list(stored["versions"]) == ["python", "torch", "transformers", "cuda", "driver", "triton"]
    assert [path.name for path in tmp_path.iterdir()] == ["part.json"]


def test_a_case_is_left_out_where_its_kind_takes_longer_than_is_left(
    parts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    record = make_record(parts, tmp_path, seconds=60.0)
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(parts.record, "time", SimpleNamespace(time=lambda: clock.now))

    def take_16_seconds() -> dict[str, Any]:
        clock.now += 16.0
        return {}

    record.args.deadline = 30.0
    record.measure("guessed too long", "slow", 50.0, dict)
    record.measure("first", "any", 1.0, take_16_seconds)
    record.measure("known too long", "any", 1.0, dict)
    record.measure("short", "other", 1.0, dict)
    assert [case["outcome"] for case in record.cases] == ["left out", "measured", "left out", "measured"]


def test_a_part_that_is_killed_while_it_writes_leaves_what_it_had(
    parts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    record = make_record(parts, tmp_path)
    record.add("first", "measured")
    monkeypatch.setattr(parts.record.os, "replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        record.add("second", "measured")
    assert [case["name"] for case in load(tmp_path, "part")["cases"]] == ["first"]


def test_every_option_is_told_and_every_file_of_tests_is_run(script: ModuleType, parts: SimpleNamespace) -> None:
    assert [f"--{field.name}" for field in fields(parts.record.PartArguments)] == OPTIONS
    assert {path.name for path in (REPOSITORY / "tests" / "gpu").glob("test_*.py")} == set(parts.checks.FILES)
    assert all(path.is_file() for path in script.PARTS.values())


def test_the_cells_of_a_layer_begin_with_those_that_matter_most(parts: SimpleNamespace, tmp_path: Path) -> None:
    args = parts.record.PartArguments("cuda", 1.0, 0.0, str(tmp_path), "")
    cells = [(cell, parts.layer.make_arguments(args, cell)) for cell in parts.layer.CELLS]
    assert len(set(parts.layer.CELLS)) == len(cells) == 16
    assert [(cell.kind, cell.experts_per_member) for cell, _ in cells[:2]] == [("eager", 1), ("eager", 8)]
    for cell, of_cell in cells:
        assert of_cell.hidden_sizes == [cell.hidden_size]
        assert of_cell.num_tokens == [{64: 16384, 256: 65536}[cell.num_rows]]
        assert (of_cell.dtype, of_cell.torch_compile) == ("bfloat16", cell.kind == "compiled")


@pytest.mark.parametrize("name", ["mot", "qwen3_moe"])
def test_experts_multiply_in_bfloat16_under_autocast_and_keep_float32_parameters(
    parts: SimpleNamespace, name: str
) -> None:
    sizes = parts.training.ComparisonArguments(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_experts=64, vocab_size=300
    )
    models = [parts.training.make_comparable_model(name, sizes, bf16) for bf16 in (True, False)]
    ids = torch.randint(300, (32, 8))
    losses = []
    for model in models:
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model(ids, labels=ids).loss)
        losses[-1].backward()
    experts = models[0].model.layers[0].mlp.experts
    assert experts.gate_up_proj.dtype == experts.down_proj.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in models[0].parameters()} == {torch.float32}
    gradients = [sorted(each.grad.norm().item() for each in model.parameters()) for model in models]
    assert gradients[0] == pytest.approx(gradients[1], rel=0.05, abs=1e-3)
    torch.testing.assert_close(losses[0], losses[1], atol=0, rtol=1e-3)


@pytest.mark.parametrize(
    ("seconds", "step", "evaluation", "expected"),
    [(200.0, 0.1, 1.0, (1200, 60)), (200.0, 0.001, 1.0, (6000, 300)), (60.0, 1.0, 3.0, (36, 12)), (1, 9, 9, (2, 2))],
)
def test_steps_and_evaluations_fit_into_the_time(
    parts: SimpleNamespace, seconds: float, step: float, evaluation: float, expected: tuple[int, int]
) -> None:
    assert parts.training.plan(seconds, step, evaluation, max_steps=6000) == expected


def test_the_text_has_both_splits_at_every_size(parts: SimpleNamespace) -> None:
    num_bytes = parts.training.MIN_BYTES
    texts = parts.training.load_documents(num_bytes)
    assert 0 < 5 * texts["validation"].num_rows < texts["train"].num_rows
    assert num_bytes < sum(len(text.encode()) for split in texts.values() for text in split["text"]) < 2 * num_bytes


@pytest.mark.slow
def test_a_dry_run_leaves_curves_and_ratios_and_no_times_of_this_machine(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.benchmarks.gpu.run", "--device", "cpu", "--scale", "0.005"]
    command += ["--parts", "layer", "model", "training"]
    # Only the layer may lack time here: a machine three times slower still measures the rest.
    command += ["--seconds", "600", "--layer_seconds", "42", "--model_seconds", "300"]
    command += ["--output_dir", tmp_path / "out"]
    done = subprocess.run(
        [*map(str, command)], cwd=REPOSITORY, env=environment_of(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + (tmp_path / "out" / "log.txt").read_text()
    records = {part: load(tmp_path / "out", part) for part in ("layer", "model", "training")}
    outcomes = {part: {case["outcome"] for case in record["cases"]} for part, record in records.items()}
    assert outcomes["layer"] <= {"measured", "left out"}
    assert outcomes["model"] == outcomes["training"] == {"measured"}
    first = {result["candidate"]: result for result in records["layer"]["cases"][0]["results"]}
    assert list(first) == ["dense", "cross_example", "einsum", "qwen3_moe", "per_sequence", "moe"]
    assert len(records["layer"]["cases"]) == 16
    assert [case["name"].split(",")[0] for case in records["model"]["cases"]] == [
        "training step", "generation", "generation", "training step", "generation",
    ]  # fmt: skip
    curves = records["training"]["curves"]
    assert list(curves) == ["dense", "mot", "qwen3_moe"]
    for curve in curves.values():
        assert curve["steps"] == curves["dense"]["steps"]
        assert curve["steps"][-1] == records["training"]["num_steps"]
        assert curve["losses"][-1] < curve["losses"][0]
        assert sorted(curve["relative_time"]) == curve["relative_time"]
    assert records["training"]["step_times"]["mot"]["relative_flops"] == pytest.approx(1.1, abs=0.1)
    for record in records.values():
        assert record.pop("command").endswith("--output_dir " + str(tmp_path / "out"))
    assert "second" not in json.dumps(records)
    assert (tmp_path / "out" / "training.png").read_bytes().startswith(b"\x89PNG")
    assert done.stdout.count("\n") < 15
