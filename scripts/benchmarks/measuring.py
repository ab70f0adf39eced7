"""Measuring speed and memory: candidates take turns, and a figure is a median with its quartiles."""

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from mot_hf.sizes import FLOP_FORMULAS

Work = Callable[[], Any]


@dataclass
class Timing:
    """Time of one candidate over all rounds.

    Args:
        seconds (`float`): Median time of one run.
        relative_time (`float`): Median over rounds of the time relative to the reference in the same round.
        relative_time_quartiles (`tuple[float, float]`): Lower and upper quartile of that.
    """

    seconds: float
    relative_time: float
    relative_time_quartiles: tuple[float, float]


def read_clock(device: str) -> float:
    """Reads the clock once the device has finished its work.

    Args:
        device (`str`): The device.

    Returns:
        `float`: Seconds since some point in time.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_in_turn(
    candidates: Mapping[str, Work], num_rounds: int, device: str, min_seconds: float = 0.0, num_warm_runs: int = 1
) -> dict[str, list[float]]:
    """Times candidates one after the other, round after round, so that a slow moment of the machine affects all alike.

    Args:
        candidates (`Mapping[str, Callable]`): The work by name.
        num_rounds (`int`): Rounds that count, after one that does not.
        device (`str`): The device.
        min_seconds (`float`, *optional*, defaults to 0): In each round, a candidate is repeated until it has taken
            this long, and the mean counts. For work that is too short for the clock.
        num_warm_runs (`int`, *optional*, defaults to 1): Runs at the start of a turn that do not count. They get back
            the memory that the system, or the host of a virtual machine, took while other candidates ran. A step that
            repeats does not pay for that. 0 if the candidates really follow each other, as in a training step.

    Returns:
        `dict[str, list[float]]`: Seconds of one run of each candidate in each round.
    """
    repeats = dict.fromkeys(candidates, 1)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(num_rounds + 1):
        for name, work in candidates.items():
            for _ in range(num_warm_runs):
                work()
            start = read_clock(device)
            for _ in range(repeats[name]):
                work()
            elapsed = (read_clock(device) - start) / repeats[name]
            if turn == 0:
                repeats[name] = max(1, round(min_seconds / elapsed))
            else:
                seconds[name].append(elapsed)
    return seconds


def summarize_times(seconds: Mapping[str, list[float]], reference: str) -> dict[str, Timing]:
    """Takes medians over rounds.

    Args:
        seconds (`Mapping[str, list[float]]`): Times by candidate, as from [`time_in_turn`]; at least two rounds.
        reference (`str`): Candidate that the others are compared with, round by round.

    Returns:
        `dict[str, Timing]`: The timing of each candidate.
    """
    timings = {}
    for name, times in seconds.items():
        ratios = [time / other for time, other in zip(times, seconds[reference], strict=True)]
        lower, _, upper = quantiles(ratios, n=4, method="inclusive")
        timings[name] = Timing(median(times), median(ratios), (lower, upper))
    return timings


def count_flops(work: Work) -> int:
    """Counts the FLOPs of some work as torch counts them: matrix products, grouped ones too, and attention.

    Args:
        work (`Callable`): The work, done once; not compiled, because torch cannot see into compiled work.

    Returns:
        `int`: FLOPs; a multiplication and an addition count as two.
    """
    with FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as counter:
        work()
    return counter.get_total_flops()


def _count_grouped_mm(left: torch.Size, right: torch.Size, *_: Any, **__: Any) -> int:
    """FLOPs of the product of rows `[S, D]` with their groups' matrices `[E, D, F]`, or of `[D, S]` with `[S, F]`."""
    return 2 * left.numel() * right[-1]


# Operations that torch (2.13) does not count.
_UNCOUNTED = FLOP_FORMULAS | {
    torch.ops.aten._grouped_mm: _count_grouped_mm,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: sdpa_flop_count(
        query, key, value
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, query, key, value, *_, **__: sdpa_backward_flop_count(grad, query, key, value)
    ),
}


def measure_peak_memory(work: Work, device: str) -> int:
    """Measures the peak memory of tensors during some work, beyond what was allocated before.

    Args:
        work (`Callable`): The work, done once.
        device (`str`): The device.

    Returns:
        `int`: Bytes, as torch's allocator hands them out; scratch memory of BLAS libraries on a CPU is not counted.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]  # it has run
    events = [event for event in events if event.name() == "[memory]"]
    # torch's stub lacks `nbytes`.
    changes = [(event.start_ns(), event.nbytes()) for event in events]  # pyright: ignore[reportAttributeAccessIssue]
    taken = peak = 0
    for _, num_bytes in sorted(changes, key=lambda change: change[0]):
        taken += num_bytes
        peak = max(peak, taken)
    return peak


def measure_matmul_rate(device: str, dtype: torch.dtype, size: int | None = None, num_rounds: int = 5) -> float:
    """Measures how fast the machine multiplies two large square matrices, the limit for work made of products.

    Args:
        device (`str`): Device.
        dtype (`torch.dtype`): dtype of the matrices.
        size (`int`, *optional*): Rows and columns of a matrix; by default large enough to keep the device busy, and
            small enough for a CPU without instructions for the dtype.
        num_rounds (`int`, *optional*, defaults to 5): Rounds; the median counts.

    Returns:
        `float`: FLOPs per second.
    """
    if size is None:
        size = 8192 if device.startswith("cuda") else 2048 if dtype == torch.float32 else 512
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = time_in_turn({"matmul": lambda: left @ right}, num_rounds, device, min_seconds=0.1)
    return 2 * size**3 / median(seconds["matmul"])


def describe_machine(device: str, *packages: str) -> dict[str, Any]:
    """Describes what a figure was measured on.

    Args:
        device (`str`): The device.
        packages (`str`): Further packages whose versions matter.

    Returns:
        `dict`: The device's name, the number of threads of a CPU, and the versions of Python, torch, transformers and
        `packages`.
    """
    on_gpu = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _name_processor(),
        "threads": None if on_gpu else torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **{name: version(name) for name in packages},
        },
    }


def _name_processor() -> str:
    """The processor's name, and the widest vector instructions that torch uses on it."""
    names = []
    if (path := Path("/proc/cpuinfo")).exists():
        names = [line.split(":")[1].strip() for line in path.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"
