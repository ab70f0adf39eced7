"""Whole MoT models against dense ones and Qwen3-MoE, as two other benchmarks measure them."""

from functools import cache, partial
from typing import Any

import torch
from rich.console import Console
from transformers import HfArgumentParser, set_seed

from scripts.benchmarks.gpu.record import PartArguments, Record
from scripts.benchmarks.measuring import measure_matmul_rate

# Seconds that a case takes on a GPU, before one was measured.
SECONDS = {"training step": 15.0, "generation": 15.0}


def measure_steps(args: PartArguments, num_experts: int) -> dict[str, Any]:
    """Times of training steps, and their memory, relative to the dense model."""
    from scripts.benchmarks.train_step import run as bench_train  # needs `datasets`, which the other cases do not

    bench_args = bench_train.Arguments(
        num_rows=args.scaled(256, step=32),
        num_columns=args.scaled(128, step=4),
        vocab_size=args.scaled(4096, step=64),
        num_rounds=7 if args.on_gpu else 2,
        device=args.device,
        dtype=args.dtype,
    )
    rate = measure_matmul_rate(args.device, getattr(torch, args.dtype), size=args.scaled(8192, step=64))
    config = bench_train.make_config(bench_args, args.scaled(512, step=64), num_experts)
    results = bench_train.measure_size(bench_args, config, rate)
    print(bench_train.tabulate([results]))
    return {"num_tokens": bench_args.num_rows * bench_args.num_columns, **results}


@cache
def make_models(
    device: str, dtype: str, hidden_size: int, intermediate_size: int, num_new_tokens: int
) -> tuple[Any, Any]:
    """The models whose generation is timed, made once."""
    from scripts.benchmarks.generation import run as bench_generate

    args = bench_generate.Arguments(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_new_tokens=num_new_tokens,
        num_rounds=7 if device.startswith("cuda") else 2,
        device=device,
        dtype=dtype,
    )
    set_seed(0)
    return args, bench_generate.make_models(args)


def measure_generation(args: PartArguments, num_rows: int) -> dict[str, Any]:
    """Speed of prefill and decoding, relative to Qwen3-MoE."""
    from scripts.benchmarks.generation import run as bench_generate

    sizes = (args.scaled(512, step=64), args.scaled(1408, step=64), args.scaled(16, step=4))
    bench_args, models = make_models(args.device, args.dtype, *sizes)
    results = bench_generate.measure(bench_args, models, num_rows)
    bench_generate.print_table(results, Console(width=110))
    for result in results:
        if not args.on_gpu:
            del result["tokens_per_second"]  # of no use on another machine
    return {"hidden_size": sizes[0], "num_experts": bench_args.num_experts, "results": results}


def main(args: PartArguments) -> None:
    """Measure the most important cases first."""
    record = Record("model", args)
    cases = [
        ("training step", "E 32", partial(measure_steps, args, 32)),
        *(
            ("generation", f"{num_rows} rows", partial(measure_generation, args, num_rows))
            for num_rows in (1, args.scaled(256, step=1))
        ),
        ("training step", "E 256", partial(measure_steps, args, 256)),
        ("generation", "32 rows", partial(measure_generation, args, args.scaled(32, step=1))),
    ]
    for kind, name, work in cases:
        record.measure(f"{kind}, {name}", kind, SECONDS[kind], work)


if __name__ == "__main__":
    main(*HfArgumentParser(PartArguments).parse_args_into_dataclasses())
