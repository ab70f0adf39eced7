"""The benchmark of a training step, at a small size."""

import json
from pathlib import Path

import pytest
import torch

from scripts.benchmarks.measuring import count_flops
from scripts.benchmarks.train_step import run as benchmark
from tests.scripts.running import run_script

PHASES = {"forward": 1.0, "backward": 2.0, "optimizer": 1.0}


def test_every_model_is_timed_at_every_size(tmp_path: Path) -> None:
    arguments = ["--hidden_sizes", "32", "--num_experts", "32", "64", "--num_hidden_layers", "2", "--num_rows", "32"]
    arguments += ["--num_columns", "4", "--num_rounds", "2"]
    printed = run_script(tmp_path, "train_step", *arguments)
    folder = tmp_path / "runs" / "train_step"
    record = json.loads((folder / "train.json").read_text())
    assert [(size["hidden_size"], size["num_experts"]) for size in record["sizes"]] == [(32, 32), (32, 64)]
    for size in record["sizes"]:
        assert 0 < size["monitor_share_of_a_logging_step"] < 1
        assert list(size["models"]) == ["dense", "MoT cross_example", "MoT per_sequence", "MoT moe", "Qwen3-MoE"]
        assert {time["relative_time"] for time in size["models"]["dense"]["times"].values()} == {1.0}
        for model in size["models"].values():
            assert list(model["times"]) == ["forward", "backward", "forward and backward", "optimizer", "step"]
            assert 1 <= model["relative_flops"] < 1.2
            assert model["peak_memory_bytes"] > 0
            assert not {"seconds", "tokens_per_second"} & set(model)  # of this machine
    assert "matmul_flops_per_second" not in record
    table = (folder / "train.md").read_text()
    assert all(line in table for line in printed.splitlines())
    assert (folder / "train.png").read_bytes().startswith(b"\x89PNG")


def test_mode_moe_and_qwen3_moe_do_the_same_work() -> None:
    args = benchmark.Arguments(vocab_size=64, num_columns=4)
    candidates = benchmark.make_candidates(args, benchmark.make_config(args, hidden_size=32, num_experts=64))
    ids = torch.randint(64, (32, 4))
    moe, qwen3_moe = candidates["MoT moe"], candidates["Qwen3-MoE"]
    torch.testing.assert_close(moe.compute_loss(ids, args), qwen3_moe.compute_loss(ids, args))
    assert moe.compute_loss(ids, args) > moe.model(ids, labels=ids, mixing="moe").loss  # it is balanced
    assert qwen3_moe.model.config._experts_implementation == "grouped_mm"
    flops = [count_flops(lambda each=each: each.run_backward(ids, args)) for each in (moe, qwen3_moe)]
    assert flops[0] == flops[1]


def test_the_modes_of_mot_share_a_model_and_leave_no_gradients() -> None:
    args = benchmark.Arguments(vocab_size=64, num_columns=4)
    candidates = benchmark.make_candidates(args, benchmark.make_config(args, hidden_size=32, num_experts=32))
    modes = [candidate for name, candidate in candidates.items() if name.startswith("MoT")]
    assert len({id(candidate.model) for candidate in modes}) == 1
    assert {id(candidate.optimizer) for candidate in modes} == {id(modes[0].optimizer)}
    before = modes[0].model.lm_head.weight.clone()
    seconds = [candidate.time_step(torch.randint(64, (32, 4)), args) for candidate in modes]
    assert all(phases.keys() == PHASES.keys() and min(phases.values()) > 0 for phases in seconds)
    assert not torch.equal(before, modes[0].model.lm_head.weight)
    assert all(parameter.grad is None for parameter in modes[0].model.parameters())


def test_figures_are_ratios_within_a_round_and_on_a_gpu_speeds_too() -> None:
    twice = {"forward": 1.0, "backward": 3.0, "optimizer": 4.0}
    rounds = [
        {"dense": {phase: slowness * time for phase, time in PHASES.items()}, "MoT": {**twice, "forward": slowness}}
        for slowness in (1.0, 2.0, 3.0)
    ]
    measured = ({"dense": 300, "MoT": 330}, {"dense": 7, "MoT": 9})
    args = benchmark.Arguments(device="cuda", num_rows=32, num_columns=4)
    models = benchmark.summarize(args, rounds, *measured, matmul_rate=200.0)
    mot = models["MoT"]
    assert mot["times"]["forward"] == {"relative_time": 1.0, "relative_time_quartiles": (1.0, 1.0)}
    assert mot["times"]["optimizer"]["relative_time"] == 2.0  # the median of 4, 2 and 4 / 3
    assert mot["times"]["step"]["relative_time"] == pytest.approx(9 / 8)
    assert mot["optimizer_share_of_a_step"] == pytest.approx(4 / 9)
    assert mot["relative_flops"] == pytest.approx(1.1)
    assert mot["share_of_matmul_rate"] == pytest.approx(330 / 5 / 200)
    assert mot["tokens_per_second"] == pytest.approx(32 * 4 / 9)
    on_cpu = benchmark.summarize(benchmark.Arguments(), rounds, *measured, matmul_rate=200.0)
    assert not {"seconds", "tokens_per_second"} & set(on_cpu["MoT"])


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`num_rows` must be a multiple of `group_size` \(32\).* got 48"):
        benchmark.Arguments(num_rows=48)
    with pytest.raises(ValueError, match="`num_rounds` must be at least 2"):
        benchmark.Arguments(num_rounds=1)
