"""Measuring speed and memory: whose turn it is, what the figures are, and that work is counted in full."""

import time

import pytest
import torch
import torch.nn.functional as F
import transformers

from scripts.benchmarks.measuring import (
    count_flops,
    describe_machine,
    measure_matmul_rate,
    measure_peak_memory,
    summarize_times,
    time_in_turn,
)


def test_candidates_take_turns_of_two_runs_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []
    works = {name: lambda name=name: calls.append(name) for name in ("first", "second", "third")}
    seconds = time_in_turn(works, num_rounds=3, device="cpu")
    assert calls == ["first", "first", "second", "second", "third", "third"] * 4
    assert list(seconds) == ["first", "second", "third"]
    assert all(len(times) == 3 for times in seconds.values())


def test_the_time_of_one_run_is_that_of_the_work() -> None:
    works = {"short": lambda: time.sleep(0.01), "long": lambda: time.sleep(0.03)}
    seconds = time_in_turn(works, num_rounds=3, device="cpu")
    assert 0.01 <= min(seconds["short"]) < 0.03 <= min(seconds["long"])


def test_short_work_is_repeated_and_its_mean_counts() -> None:
    calls = {"short": 0, "long": 0}

    def work(name: str, duration: float) -> None:
        calls[name] += 1
        time.sleep(duration)

    works = {"short": lambda: work("short", 0.005), "long": lambda: work("long", 0.06)}
    seconds = time_in_turn(works, num_rounds=2, device="cpu", min_seconds=0.05)
    assert calls["long"] == 3 * 2
    assert 3 * 2 < calls["short"] <= 3 + 1 + 2 * 10
    assert 0.005 <= min(seconds["short"]) < 0.05


def test_the_first_run_of_a_turn_does_not_count() -> None:
    previous = ""

    def work(name: str) -> None:
        nonlocal previous
        time.sleep(0.001 if name == previous else 0.03)
        previous = name

    seconds = time_in_turn({name: lambda name=name: work(name) for name in ("first", "second")}, 3, "cpu")
    assert max(*seconds["first"], *seconds["second"]) < 0.03


def test_ratios_are_taken_round_by_round() -> None:
    # The machine is ten times slower in the last round; the ratio of the medians would be 1.5.
    seconds = {"reference": [1.0, 2.0, 20.0], "candidate": [3.0, 2.0, 40.0]}
    timings = summarize_times(seconds, "reference")
    assert timings["candidate"].relative_time == 2.0
    assert timings["candidate"].relative_time_quartiles == (1.5, 2.5)
    assert timings["candidate"].seconds == 3.0
    assert timings["reference"].relative_time == 1.0
    assert timings["reference"].relative_time_quartiles == (1.0, 1.0)


def test_the_flops_of_a_product_and_of_its_gradients_are_known() -> None:
    left, right = torch.randn(3, 5), torch.randn(5, 7, requires_grad=True)
    assert count_flops(lambda: left @ right) == 2 * 3 * 5 * 7
    assert count_flops(lambda: (left @ right).sum().backward()) == 2 * 2 * 3 * 5 * 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_flops_of_a_grouped_product_are_those_of_its_rows(dtype: torch.dtype) -> None:
    rows = torch.randn(24, 16, dtype=dtype, requires_grad=True)
    weights = torch.randn(3, 8, 16, dtype=dtype, requires_grad=True)
    ends = torch.tensor([4, 4, 24], dtype=torch.int32)  # the second matrix is multiplied with no row
    gradient = torch.randn(24, 8, dtype=dtype)

    def multiply() -> torch.Tensor:
        return F.grouped_mm(rows, weights.transpose(1, 2), offs=ends)

    one_by_one = count_flops(lambda: [rows[:4] @ weights[0].T, rows[4:] @ weights[2].T])
    assert count_flops(multiply) == one_by_one == 2 * 24 * 16 * 8
    assert count_flops(lambda: multiply().backward(gradient)) == 3 * one_by_one


def test_the_peak_of_memory_is_that_of_what_lives_at_once() -> None:
    mebibyte = 2**20

    def work() -> None:
        kept = torch.empty(mebibyte, dtype=torch.uint8)
        passing = torch.empty(4 * mebibyte, dtype=torch.uint8)
        del passing
        second = torch.empty(3 * mebibyte, dtype=torch.uint8)
        del kept, second

    assert measure_peak_memory(work, "cpu") == 5 * mebibyte


def test_memory_that_was_taken_before_is_not_in_the_peak() -> None:
    before = torch.ones(2**20, dtype=torch.uint8)
    assert measure_peak_memory(lambda: before.clone(), "cpu") == 2**20


def test_the_flops_of_products_in_another_dtype_are_counted() -> None:
    left, right = (torch.empty(2, *shape, dtype=torch.bfloat16, device="meta") for shape in ((3, 4), (4, 5)))
    # As a GPU does it: bfloat16 into float32.
    assert count_flops(lambda: torch.bmm(left, right, out_dtype=torch.float32)) == 2 * 2 * 3 * 4 * 5
    assert count_flops(lambda: torch.mm(left[0], right[0], out_dtype=torch.float32)) == 2 * 3 * 4 * 5


def test_the_matmul_rate_is_flops_by_time() -> None:
    rate = measure_matmul_rate("cpu", torch.float32, size=256, num_rounds=2)
    left, right = torch.randn(256, 256), torch.randn(256, 256)
    fastest = min(time_in_turn({"matmul": lambda: left @ right}, 20, "cpu")["matmul"])
    assert rate == pytest.approx(count_flops(lambda: left @ right) / fastest, rel=0.9)


def test_the_machine_is_described_without_a_name_of_its_own() -> None:
    machine = describe_machine("cpu")
    assert machine["threads"] == torch.get_num_threads()
    assert torch.backends.cpu.get_cpu_capability() in machine["device"]
    assert machine["versions"]["torch"] == torch.__version__
    assert machine["versions"]["transformers"] == transformers.__version__
    assert set(machine) == {"device", "threads", "versions"}


def test_flops_of_attention_on_a_cpu_are_counted() -> None:
    query, key, value = (torch.randn(2, 3, 16, 8, requires_grad=True) for _ in range(3))
    products = 2 * 2 * 3 * 16 * 16 * 8
    attend = torch.nn.functional.scaled_dot_product_attention
    assert count_flops(lambda: attend(query, key, value)) == 2 * products
    assert count_flops(lambda: attend(query, key, value).sum().backward()) == (2 + 5) * products
