"""One layer of MoT in each mode against the dense layer, plain einsums and Qwen3-MoE, cell by cell."""

from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from rich.console import Console
from transformers import HfArgumentParser

from scripts.benchmarks.gpu.record import PartArguments, Record
from scripts.benchmarks.layer import run as bench_layer
from scripts.benchmarks.measuring import measure_matmul_rate

# Seconds that a cell takes on a GPU, before one was measured; a compiled one compiles four layers twice.
SECONDS = {"eager": 5.0, "compiled": 35.0}


class Cell(NamedTuple):
    """A width D, a number of rows and of experts by group member, eager or compiled."""

    kind: str
    num_rows: int
    hidden_size: int
    experts_per_member: int


# A compiled cell takes more time than all eager ones together.
CELLS = [
    Cell(*values)
    for group in (
        product(["eager"], [64], [1024, 2048], [1, 8]),
        product(["compiled"], [64], [1024], [1, 8]),
        product(["eager"], [256], [1024, 2048], [1, 8]),
        product(["compiled"], [64], [2048], [1, 8]),
        product(["compiled"], [256], [1024, 2048], [1, 8]),
    )
    for values in group
]


def make_arguments(args: PartArguments, cell: Cell) -> bench_layer.Arguments:
    """The arguments of `benchmarks/layer` for a cell; at full scale it has 16 384 or 65 536 tokens."""
    num_columns = args.scaled(256, step=4)
    return bench_layer.Arguments(
        hidden_sizes=[args.scaled(cell.hidden_size, step=64)],
        num_tokens=[cell.num_rows * num_columns],
        num_columns=num_columns,
        candidates=["dense", "cross_example", "einsum", "per_sequence", "moe", "qwen3_moe"],
        phases=["forward+backward"],
        num_rounds=7 if args.on_gpu else 2,
        device=args.device,
        dtype=args.dtype,
        torch_compile=cell.kind == "compiled",
    )


def measure(args: bench_layer.Arguments, experts_per_member: int, rate: float, console: Console) -> dict[str, Any]:
    """The results of a cell by candidate."""
    config = bench_layer.make_config(args, args.hidden_sizes[0], experts_per_member)
    results = bench_layer.measure_cell(args, config, args.num_tokens[0], rate)
    bench_layer.print_tables(results, console)
    return {"results": results}


def main(args: PartArguments) -> None:
    """Measure cell after cell while there is time."""
    record, console = Record("layer", args), Console(width=110)
    rate = measure_matmul_rate(args.device, getattr(torch, args.dtype), size=args.scaled(8192, step=64))
    if args.on_gpu:
        record.content["matmul_flops_per_second"] = rate
    for cell in CELLS:
        cell_args = make_arguments(args, cell)
        width, num_tokens = cell_args.hidden_sizes[0], cell_args.num_tokens[0]
        num_experts = cell.experts_per_member * cell_args.group_size
        name = f"{cell.kind}, D {width}, E {num_experts}, {num_tokens} tokens"
        work = partial(measure, cell_args, cell.experts_per_member, rate, console)
        record.measure(name, cell.kind, SECONDS[cell.kind], work)


if __name__ == "__main__":
    main(*HfArgumentParser(PartArguments).parse_args_into_dataclasses())
