"""What processes send to each other, counted and calculated."""

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers.distributed.expert_parallel")

from scripts.benchmarks.parallelism import run as benchmark
from tests.scripts.running import REPOSITORY, run_script


@pytest.mark.slow
def test_what_is_counted_is_what_is_calculated(tmp_path: Path) -> None:
    printed = run_script(tmp_path, "parallelism")
    folder = tmp_path / "runs" / "parallelism"
    assert (folder / "parallelism.md").read_text().strip() == printed.strip()
    record = json.loads((folder / "parallelism.json").read_text())
    for name, counted in record["counted"].items():
        # Not calculated: sums of statistics and of the norms' gradients.
        assert counted["sent_bytes"] == pytest.approx(counted["calculated_bytes"], rel=0.01), name
    equal, routed = (record["counted"][name] for name in ("fsdp 2, ep 2", "fsdp 2, ep 2, transformers' exchange"))
    assert (equal["numbers"]["exchanges"], routed["numbers"]["exchanges"]) == (4, 5)
    assert (equal["looks"], routed["looks"]) == (1, 1)


def test_the_stored_results_are_those_of_the_sizes_that_they_name() -> None:
    stored = json.loads((REPOSITORY / "scripts/benchmarks/parallelism/results/cpu/parallelism.json").read_text())
    args = benchmark.Arguments(**stored["arguments"])
    assert stored["calculated_milliseconds"] == list(benchmark.simulate(args))
    assert stored["balances"] == {str(number): benchmark.find_balance(args, number) for number in args.num_experts}


def test_times_by_hand() -> None:
    # 4 rows a group, 8 experts; 1 TFLOP/s, 1 GB/s in a node of 2, 0.25 GB/s between nodes.
    args = benchmark.Arguments(
        hidden_size=10,
        intermediate_size=100,
        group_size=4,
        num_experts=[8],
        num_tokens=1000,
        num_devices=[2, 16],
        devices_per_node=2,
        tflops=1.0,
        gigabytes_in_node=1.0,
        gigabytes_between_nodes=0.25,
    )
    node, nodes = benchmark.simulate(args)
    assert node["products"] == nodes["products"] == pytest.approx(3 * 1000 * (6 * 10 * 100 + 4 * 8 * 10) / 1e9)
    weights = 3 * 10 * 100 * 4 * 2
    # Weights travel twice in 2 bytes, gradients once in 4.
    assert node["fsdp"] == pytest.approx(4 * weights / 2 / 1e6)
    # All links of a node together are slower than those within it.
    assert nodes["fsdp"] == pytest.approx(4 * weights * 15 / 16 / (2 * 0.25 * 1e6))
    rows = 4 * 1000 * 8 / 4 * 10 * 2
    assert node["experts_in_node"] == pytest.approx({"exchange": rows / 2 / 1e6, "gather": 0})
    assert "experts_in_nodes" not in node
    # 8 copies of the experts of a node, 2 of those of 4 nodes.
    assert nodes["experts_in_node"]["gather"] == pytest.approx(4 * weights / 2 * 7 / 8 / 0.25e6)
    assert nodes["experts_in_nodes"]["exchange"] == pytest.approx(rows * 6 / 8 / 0.25e6)
    assert nodes["experts_in_nodes"]["gather"] == pytest.approx(4 * weights / 8 * 1 / 2 / 0.25e6)
    # At as many tokens, both cost the same bytes.
    balance = benchmark.find_balance(args, 8)
    assert balance["tokens_of_equal_bytes"] == pytest.approx(3 * 100 * 4**2 / 8)
    with pytest.raises(ValueError, match=r"`num_devices` has 12, which is not a multiple of `devices_per_node` \(8\)"):
        benchmark.Arguments(num_devices=[12])


def test_the_page_shows_the_stored_tables() -> None:
    tables = (REPOSITORY / "scripts/benchmarks/parallelism/results/cpu/parallelism.md").read_text()
    page = (REPOSITORY / "docs/guides/many_devices.md").read_text()
    for line in tables.splitlines():
        assert line in page
