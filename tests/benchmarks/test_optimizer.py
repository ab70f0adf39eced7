"""The benchmark of optimizers, at a small size."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mot_hf import MoTForCausalLM
from scripts.benchmarks.optimizer import run as benchmark
from tests.models import tiny_config
from tests.scripts.running import run_script

FAST = ["AdamW, fused", "AdamW, fused, bfloat16", "SGD"]


def test_every_optimizer_is_measured_on_both_models(tmp_path: Path) -> None:
    arguments = ["--hidden_size", "32", "--intermediate_size", "64", "--num_hidden_layers", "2", "--vocab_size", "64"]
    arguments += ["--num_columns", "4", "--step_rows", "32", "96", "--num_devices", "4", "--num_rounds", "2"]
    printed = run_script(tmp_path, "optimizer", *arguments, "--optimizers", *FAST)
    folder = tmp_path / "runs" / "optimizer"
    models = json.loads((folder / "optimizer.json").read_text())["models"]
    assert models["MoT"]["num_parameters"] > 2 * models["dense"]["num_parameters"]
    for model in models.values():
        assert list(model["optimizers"]) == FAST
        for result in model["optimizers"].values():
            ratio = result["relative_time"]
            assert result["share_of_a_step"] == pytest.approx({"32": ratio / (ratio + 1), "96": ratio / (ratio + 3)})
            assert "seconds" not in result  # of this machine
    assert (folder / "optimizer.md").read_text().strip() == printed.strip()
    assert "| AdamW, fused | `adamw_torch_fused` |" in printed
    assert (folder / "optimizer.png").read_bytes().startswith(b"\x89PNG")


def measure(name: str) -> dict[str, Any]:
    args = benchmark.Arguments(hidden_size=32, intermediate_size=64, vocab_size=64, num_columns=4, num_rounds=2)
    model = MoTForCausalLM(benchmark.make_config(args, is_dense=False)).train()
    return benchmark.measure_optimizer(args, model, torch.randint(64, (32, 4)), benchmark.CHOICES[name])


@pytest.mark.parametrize(
    ("name", "held", "peak"),
    [
        ("AdamW, fused", (4, 4, 8), 0),
        ("AdamW, foreach", (4, 4, 8), 4),
        ("AdamW, fused, bfloat16", (2, 2, 4), 0),
        ("SGD", (4, 4, 0), 0),
    ],
)
def test_memory_is_that_of_the_tensors(name: str, held: tuple[float, ...], peak: float) -> None:
    result = measure(name)
    sizes = result["bytes_per_parameter"]
    assert [sizes[part] for part in ("parameters", "gradients", "states")] == pytest.approx(held, abs=0.01)
    assert sizes["peak"] == pytest.approx(peak, abs=0.01)
    one, many = (result["calculated_bytes_per_device"][n] for n in (8, 64))
    assert one["fsdp"] == 8 * many["fsdp"]
    assert one["zero_1"] - many["zero_1"] == pytest.approx(one["fsdp"] * held[2] / sum(held) * 7 / 8, rel=0.01)


def test_8_bit_states_of_bitsandbytes_are_a_quarter() -> None:
    pytest.importorskip("bitsandbytes")
    assert 2 < measure("8-bit AdamW, bitsandbytes")["bytes_per_parameter"]["states"] < 3


def test_8_bit_states_of_torchao_are_counted_with_scales_and_table() -> None:
    states = pytest.importorskip("torchao.optim.subclass_8bit")
    state = states.OptimState8bit.zeros((64, 256), signed=True, block_size=256)
    assert benchmark.count_bytes([state, state.codes, 3]) == 64 * 256 + 64 * 4 + 256 * 4


def test_the_trainer_makes_every_optimizer() -> None:
    kinds = {}
    for name, choice in benchmark.CHOICES.items():
        parameters = benchmark.take_parameters(model_with_gradients(), choice.dtype)
        assert {getattr(parameter.grad, "dtype", None) for parameter in parameters} == {choice.dtype}
        try:
            optimizer = benchmark.make_optimizer(choice, parameters)
        except ImportError:
            continue  # not installed
        kinds[name] = (type(optimizer).__module__.split(".")[0], type(optimizer).__name__)
        assert bool(optimizer.defaults.get("fused")) == ("fused" in name)
    assert kinds["AdamW, loop"] == kinds["AdamW, fused, bfloat16"] == ("torch", "AdamW")
    assert kinds["Adafactor"] == ("transformers", "Adafactor")
    assert kinds.get("8-bit AdamW, torchao", ("torchao", "AdamW8bit")) == ("torchao", "AdamW8bit")
    assert kinds.get("8-bit AdamW, bitsandbytes", ("bitsandbytes", "AdamW")) == ("bitsandbytes", "AdamW")


def model_with_gradients() -> MoTForCausalLM:
    model = MoTForCausalLM(tiny_config())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


def test_what_is_not_installed_is_skipped_and_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def find_nothing(*args: object) -> None:
        raise ImportError("Install torchao.")

    measured = benchmark.make_optimizer
    monkeypatch.setattr(
        benchmark, "make_optimizer", lambda *args: find_nothing() if "8bit" in args[0].optim else measured(*args)
    )
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64, "num_columns": 4}
    names = ["8-bit AdamW, torchao", "SGD"]
    benchmark.main(benchmark.Arguments(output_dir=str(tmp_path), optimizers=names, num_rounds=2, **sizes))
    assert "MoT, 8-bit AdamW, torchao: skipped. Install torchao." in capsys.readouterr().out
    models = json.loads((tmp_path / "optimizer.json").read_text())["models"]
    assert all(list(model["optimizers"]) == ["SGD"] for model in models.values())
    assert "Skipped: 8-bit AdamW, torchao. Install torchao." in (tmp_path / "optimizer.md").read_text()


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="`optimizers` has 'adam', which must be one of: AdamW, loop;"):
        benchmark.Arguments(optimizers=["adam"])
    with pytest.raises(ValueError, match=r"`num_rows` \(48\) must be a multiple of `group_size` \(32\)"):
        benchmark.Arguments(num_rows=48)
    with pytest.raises(ValueError, match="`step_rows` multiples of `num_rows`, got 96"):
        benchmark.Arguments(num_rows=64, step_rows=[64, 96])
    with pytest.raises(ValueError, match="`num_rounds` must be at least 2"):
        benchmark.Arguments(num_rounds=1)
