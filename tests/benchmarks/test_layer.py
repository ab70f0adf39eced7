"""The benchmark of one layer: its candidates do the same, and it leaves what it should."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mot_hf.modeling.companions_mot import NUM_POSITION_BUCKETS
from scripts.benchmarks.layer import run as layer_benchmark
from scripts.benchmarks.measuring import count_flops
from tests.scripts.running import run_script

SMALL = {"num_tokens": [96], "num_columns": 6, "group_size": 8, "experts_per_member": [1, 2]}
COMMAND = ["--num_tokens", "96", "--num_columns", "6", "--group_size", "8", "--num_rounds", "2"]


def make_layers(members: int) -> tuple[Tensor, dict[str, nn.Module]]:
    """Two groups of rows of 6 tokens [16, 6, 32], and the candidates."""
    args = layer_benchmark.Arguments(**SMALL)
    x = torch.randn(16, 6, 32, requires_grad=True)
    return x, layer_benchmark.make_layers(layer_benchmark.make_config(args, 32, members), x, args.candidates)


def run(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, and the gradients of input and parameters under a gradient of the output that is the same every time."""
    output = layer(x)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    wanted = [x, *(parameter for name, parameter in sorted(layer.named_parameters(), key=lambda pair: pair[0]))]
    return [output, *torch.autograd.grad(output, wanted, gradient)]


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize(("plain", "ours"), [("einsum", "cross_example"), ("qwen3_moe", "moe")])
def test_another_implementation_equals_ours_in_values_and_gradients(plain: str, ours: str, members: int) -> None:
    x, layers = make_layers(members)
    theirs, expected = run(layers[plain], x), run(layers[ours], x)
    assert len(theirs) == len(expected) == 5  # output, input, router, two of experts
    for value, other in zip(theirs, expected, strict=True):
        assert other.abs().max() > 1e-6
        torch.testing.assert_close(value, other, atol=1e-6 * other.detach().abs().max().item(), rtol=1e-4)


def test_candidates_have_the_flops_of_the_dense_layer_but_for_router_and_mixing() -> None:
    x, layers = make_layers(members=2)
    flops = {name: count_flops(lambda layer=layer: layer(x)) for name, layer in layers.items()}
    num_tokens, width, num_experts = 96, 32, 16
    router = mixing = 2 * num_tokens * num_experts * width
    assert flops["dense"] == 3 * 2 * num_tokens * width * 96  # 96 is 2.75 * 32 as a multiple of 16
    assert flops["qwen3_moe"] == flops["moe"] == flops["dense"] + router
    assert flops["einsum"] == flops["dense"] + router + 2 * mixing
    mean_outputs, adding_up = router, 2 * num_tokens * 2 * width  # of experts that are not run; of two that are
    assert flops["per_sequence"] == flops["dense"] + router + mean_outputs + adding_up
    num_sums = 2 * (1 + NUM_POSITION_BUCKETS)  # of mixtures and outputs, over all groups and by bucket
    statistics = 2 * num_tokens // 8 * num_experts * (num_sums * width + 1)
    assert flops["cross_example"] == flops["einsum"] + statistics


def test_the_mot_layer_gathers_statistics_as_in_training() -> None:
    x, layers = make_layers(members=1)
    layer = layers["cross_example"]
    assert isinstance(layer, layer_benchmark.MoTLayer)
    layer(x)
    statistics, num_tokens = layer.statistics
    assert num_tokens[1:].sum() == num_tokens[0] == x.shape[0] * x.shape[1]
    torch.testing.assert_close(statistics.mean_input, layer.block.companions.mean_input)


@pytest.mark.slow
def test_it_measures_every_cell_phase_and_candidate(tmp_path: Path) -> None:
    arguments = [*COMMAND, "--hidden_sizes", "32", "64", "--experts_per_member", "2", "--output_dir", "layer"]
    printed = run_script(tmp_path, "layer", *arguments)
    record = json.loads((tmp_path / "layer" / "layer.json").read_text())
    results, candidates = record["results"], record["arguments"]["candidates"]
    assert [
        (result["hidden_size"], result["num_experts"], result["phase"], result["candidate"]) for result in results
    ] == [
        (width, 16, phase, candidate)
        for width in (32, 64)
        for phase in ("forward", "forward+backward")
        for candidate in candidates
    ]
    for result in results:
        if result["candidate"] == "dense":
            assert result["relative_time"] == result["relative_flops"] == 1
        assert result["relative_time"] > 0
        assert result["share_of_matmul_rate"] > 0
        assert result["peak_memory_bytes"] > 96 * result["hidden_size"] * 4
    text = json.dumps(record)
    assert "second" not in text
    assert all(label in printed for label in ("MoT cross_example", "einsum with copies", "Qwen3-MoE", "E 16"))
    assert (tmp_path / "layer" / "layer.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "layer" / "layer.md").read_text().count("| D 64, 96 tokens, E 16, forward |") == 5


def test_candidates_and_phases_can_be_chosen(tmp_path: Path) -> None:
    chosen = {"candidates": ["einsum"], "phases": ["forward"], "hidden_sizes": [32], "num_rounds": 2}
    layer_benchmark.main(layer_benchmark.Arguments(**(SMALL | chosen), dtype="bfloat16", output_dir=str(tmp_path)))
    results = json.loads((tmp_path / "layer.json").read_text())["results"]
    assert [(result["phase"], result["candidate"]) for result in results] == [
        ("forward", "dense"),
        ("forward", "einsum"),
    ] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tokens": [96, 100]}, r"`num_tokens` has 100, .* 8 \* 6 = 48, .* give 144"),
        ({"num_tokens": [0]}, "`num_tokens` has 0, .* give 48"),
        ({"candidates": ["dense", "mlp"]}, "`candidates` has 'mlp', which must be one of dense, cross_example"),
        ({"phases": ["backward"]}, "`phases` has 'backward', which must be one of forward"),
        ({"num_rounds": 1}, "`num_rounds` must be at least 2"),
        ({"experts_per_member": [0]}, r"`experts_per_member` must be at least 1, got \[0\]"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_benchmark.Arguments(**(SMALL | arguments))
