"""Models that are spread over two, four and eight real processes, against one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainingArguments

pytest.importorskip("transformers.distributed.expert_parallel")

from mot_hf import MoTConfig
from mot_hf.training.estimate import estimate_memory
from mot_hf.training.layout import Layout
from tests.modeling.parallel_worker import (
    CACHES,
    HEADS,
    LARGER,
    LARGER_BATCH,
    LAYOUTS,
    NUM_LAYERS,
    VOCAB_SIZE,
    generate,
    make_batch,
    probe,
    run_eval,
    run_modes,
)
from tests.models import MODES, companions_of, random_ids, tiny_config, trained
from tests.processes import start

pytestmark = pytest.mark.slow

RUNS = (
    "tp-None-causal",
    "tp-None-masked",
    "ep_tp-all_to_all-causal",
    "ep_tp-mot_all_to_all-causal",
    "ep_fsdp-all_to_all-causal",
    "ep_fsdp-all_to_all-masked",
    "ep_fsdp-mot_all_to_all-causal",
    "ep_fsdp-mot_all_to_all-masked",
    "fsdp-None-causal",
)
LARGER_RUNS = (
    "tp_fsdp-None-short",
    "tp_ep_fsdp-all_to_all-short",
    "tp_ep_fsdp-mot_all_to_all-short",
    "ep_efsdp-all_to_all-short",
    "ep_efsdp-mot_all_to_all-short",
    "8_tp_ep_efsdp-mot_all_to_all-short",
    "8_ep_efsdp-mot_all_to_all-short",
)
ALL_RUNS = [*RUNS, *LARGER_RUNS]
EXPERTS = "model.layers.3.mlp.experts"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, and what two, four and eight processes made of them in every layout."""
    folder = tmp_path_factory.mktemp("parallel")
    for head, cls in HEADS.items():
        sizes = {"vocab_size": VOCAB_SIZE, "moe_intermediate_size": 24, "num_hidden_layers": NUM_LAYERS[head]}
        trained(cls(tiny_config(**sizes))).save_pretrained(folder / head)
    HEADS["causal"](MoTConfig(**LARGER)).save_pretrained(folder / "larger")
    start(Path(__file__).with_name("parallel_worker.py"), folder, *map(str, LAYOUTS), timeout=600)
    return folder


class OneProcess(dict[tuple[str, int], dict[str, Any]]):
    """The same by one process, by head and number of rows."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, key: tuple[str, int]) -> dict[str, Any]:
        head, num_rows = key
        model: Any = HEADS[head].from_pretrained(self.folder / head)
        self[key] = results = run_modes(model, make_batch(num_rows), probe(num_rows), scale=1)
        results["companions"] = companions_of(model)
        if head == "causal":
            results["tokens"] = {cache: generate(model, cache) for cache in CACHES}
        return results


@pytest.fixture(scope="module")
def one_process(folder: Path) -> OneProcess:
    return OneProcess(folder)


def load(folder: Path, run: str) -> tuple[dict[str, Any], tuple[str, int]]:
    results = torch.load(folder / f"{run}.pt")
    return results, (run.rsplit("-", 1)[1], results["num_rows"])


def assert_same(values: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare to 1e-5, or that share of a tensor's largest value if it is above 1: gradients are up to 12."""
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        atol = 1e-5 * max(1.0, float(value.abs().max()))
        torch.testing.assert_close(values[name], value, rtol=0, atol=atol, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("run", ALL_RUNS)
def test_processes_are_one(folder: Path, one_process: OneProcess, run: str, mode: str) -> None:
    results, key = load(folder, run)
    expected = one_process[key]
    torch.testing.assert_close(results[mode]["logits"], expected[mode]["logits"], rtol=0, atol=1e-5)
    torch.testing.assert_close(results["eval"][mode], expected["eval"][mode], rtol=0, atol=1e-5)
    assert_same(results[mode]["grads"], expected[mode]["grads"])
    assert all(value.abs().max() > 1e-3 for name, value in expected["cross_example"]["grads"].items())


@pytest.mark.parametrize("name", ["checkpointed", "checkpointed per_sequence"])
@pytest.mark.parametrize("run", ALL_RUNS)
def test_layers_may_be_computed_again(folder: Path, one_process: OneProcess, run: str, name: str) -> None:
    results, key = load(folder, run)
    assert_same(results[name]["grads"], one_process[key][name]["grads"])


@pytest.mark.parametrize("run", ALL_RUNS)
def test_autocast_rounds_as_in_one_process(folder: Path, one_process: OneProcess, run: str) -> None:
    results, key = load(folder, run)
    expected, plain = one_process[key]["autocast"], one_process[key]["cross_example"]
    error = (results["autocast"]["logits"].float() - expected["logits"].float()).norm()
    assert 0 < expected["logits"].float().norm() * 0.02 > error
    for name, value in expected["grads"].items():
        rounding = (value - plain["grads"][name]).norm()
        assert (results["autocast"]["grads"][name] - value).norm() <= rounding + 0.02 * value.norm(), name


@pytest.mark.parametrize("run", ALL_RUNS)
def test_statistics_are_those_of_one_process(folder: Path, one_process: OneProcess, run: str) -> None:
    results, key = load(folder, run)
    assert_same(results["companions"], one_process[key]["companions"])


@pytest.mark.parametrize("run", [run for run in RUNS if "causal" in run and "fsdp" not in run])
def test_generation_is_that_of_one_process(folder: Path, one_process: OneProcess, run: str) -> None:
    results, key = load(folder, run)
    for cache, expected in one_process[key]["tokens"].items():
        assert torch.equal(results["tokens"][cache], expected), cache


@pytest.mark.parametrize("run", ALL_RUNS)
def test_a_save_has_every_weight_and_the_mean_of_all_processes_statistics(folder: Path, run: str) -> None:
    results, (head, _) = load(folder, run)
    saved = load_file(folder / f"{run.rsplit('-', 1)[0]}-{head}-saved" / "model.safetensors")
    expected = load_file(folder / head / "model.safetensors") | results["companions"]
    first = min(name for name in expected if name.endswith("companions.mean_input"))
    expected[first] = expected[first] + ((results["num_processes"] - 1) / 2 if "fsdp" in run else 0)
    assert_same(saved, expected)


def test_a_pipeline_of_two_processes_is_one(folder: Path) -> None:
    results = torch.load(folder / "pp-None-causal.pt")
    expected = run_eval(HEADS["causal"].from_pretrained(folder / "causal"), make_batch(6))
    for mode, logits in expected.items():
        torch.testing.assert_close(results["eval"][mode], logits, rtol=0, atol=1e-5)


def test_plans_leave_no_large_weight_whole(folder: Path) -> None:
    # D = 32, E = 8 experts of width F = 24, 4 heads and 2 key/value heads of width 8, dense width 64, 103 words.
    layouts = {
        "tp-None-causal": {
            f"{EXPERTS}.gate_up_proj": (8, 24, 32),
            f"{EXPERTS}.down_proj": (8, 32, 12),
            "model.layers.3.self_attn.q_proj.weight": (16, 32),
            "model.layers.3.self_attn.k_proj.weight": (8, 32),
            "model.layers.3.self_attn.o_proj.weight": (32, 16),
            "model.layers.0.mlp.gate_proj.weight": (32, 32),
            "model.layers.0.mlp.down_proj.weight": (32, 32),
            "model.embed_tokens.weight": (52, 32),
            "lm_head.weight": (52, 32),
        },
        "ep_tp-all_to_all-causal": {f"{EXPERTS}.gate_up_proj": (4, 48, 32), f"{EXPERTS}.down_proj": (4, 32, 24)},
        "ep_fsdp-all_to_all-causal": {
            f"{EXPERTS}.gate_up_proj": (4, 48, 32),
            f"{EXPERTS}.down_proj": (4, 32, 24),
            "model.layers.3.mlp.gate.weight": (4, 32),
        },
    }
    for run, expected in layouts.items():
        shards = load(folder, run)[0]["shards"]
        assert expected.items() <= shards.items(), run


def test_an_exchange_of_equal_shares_sends_what_its_formula_says_and_never_looks(folder: Path) -> None:
    num_layers, num_experts, num_rows, width, num_processes = 2, 8, 7, 32, 2
    formula = 4 * (num_processes - 1) / num_processes * num_experts * num_rows * width * 4
    equal, routed = (load(folder, f"ep_fsdp-{name}-causal")[0]["traffic"] for name in ("mot_all_to_all", "all_to_all"))
    # Of what is exchanged, a share stays in the process.
    assert equal["bytes"]["exchanges"] * (num_processes - 1) / num_processes == num_layers * formula
    assert equal["numbers"]["exchanges"] == num_layers * 4
    # The agreement about rows is between hosts.
    assert equal["looks"] == 1
    # By a controller's choice, numbers of rows travel first, and the host waits for them in each layer.
    assert routed["bytes"]["exchanges"] == equal["bytes"]["exchanges"] + num_layers * num_experts * 8
    assert routed["numbers"]["exchanges"] == num_layers * 5
    assert routed["looks"] == num_layers


@pytest.mark.parametrize("exchange", ["all_to_all", "mot_all_to_all"])
def test_processes_may_have_different_numbers_of_groups(folder: Path, exchange: str) -> None:
    results, _ = load(folder, f"ep_fsdp-{exchange}-causal")
    model = HEADS["causal"].from_pretrained(folder / "causal").train()
    with torch.no_grad():
        expected = model(random_ids(12, 7), mixing="cross_example").logits
    torch.testing.assert_close(results["unequal"]["train"], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(results["unequal"]["last"], expected[:4], rtol=0, atol=1e-5)


def test_weights_are_gathered_in_half_the_bytes_if_they_are_rounded_before(folder: Path) -> None:
    whole, rounded = load(folder, "fsdp-None-causal")[0]["gathered"].values()
    model = HEADS["causal"].from_pretrained(folder / "causal")
    in_blocks = sum(value.nbytes for name, value in model.named_parameters() if ".layers." in name)
    # Forward and backward, and at least once what stays after the forward pass.
    total = sum(value.nbytes for value in model.parameters())
    assert in_blocks + total < whole["bytes"]["gathers"] < 2.05 * total
    assert rounded["bytes"]["gathers"] == whole["bytes"]["gathers"] / 2
    # Gradients are summed as they are.
    assert rounded["bytes"]["scatters"] == whole["bytes"]["scatters"] == pytest.approx(total, rel=0.05)


@pytest.mark.parametrize(
    ("run", "layout"),
    [
        ("tp-None-causal", Layout(2, tp=2)),
        ("ep_tp-mot_all_to_all-causal", Layout(2, tp=2, ep=2)),
        ("fsdp-None-causal", Layout(2, fsdp=2)),
        ("ep_fsdp-mot_all_to_all-causal", Layout(2, fsdp=2, ep=2)),
    ],
)
def test_a_pass_takes_the_memory_that_is_estimated(folder: Path, run: str, layout: Layout) -> None:
    num_rows, num_columns = LARGER_BATCH
    args = TrainingArguments("unused", per_device_train_batch_size=num_rows, bf16=True, use_cpu=True)
    with torch.device("meta"):
        model = HEADS["causal"](MoTConfig(**LARGER))
    memory = estimate_memory(model, num_columns, layout, args, is_on_gpu=False)
    assert memory.activations is not None
    peak = load(folder, run)[0]["peak"]
    assert peak < 1.15 * (memory.activations + memory.gathered)
    # Only one of two blocks is large here, so that FSDP never has as much as two of its size.
    assert peak > 0.85 * (memory.activations + (memory.gathered if layout.ep > 1 else 0))
