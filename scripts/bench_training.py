"""Measure what a training step costs: a MoT model against the dense model of equal FLOPs, side by side.

Both models have the same attention, embeddings and dense layers; a MoT layer's experts together do the work of the
dense layer that it replaces. A round takes one step with each model, in turn; a figure is the median over rounds, of
times and of ratios to the dense model in the same round. The optimizer (AdamW) is timed by itself: it has `group_size`
times the parameters to update in a MoT layer, however many tokens a step has. "MoT, monitored" is the same model in a
step that `MixingMonitor` looks at, as it does in steps that log. Close other programs. Writes
`training.json` to the output folder, with absolute speeds only from a GPU. The stored results:

    python scripts/bench_training.py --output_dir results/bench_training

On a GPU:

    python scripts/bench_training.py --device cuda --bf16 true --hidden_size 512 --num_rows 256 --num_experts 256
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import HfArgumentParser, Trainer, TrainerControl, TrainerState, TrainingArguments, set_seed

from mot_hf import MoTConfig, MoTForCausalLM
from mot_hf.training import MixingMonitor

PHASES = ("forward", "backward", "optimizer")


@dataclass
class Arguments:
    """Sizes and repetitions."""

    output_dir: str = field(default="runs/bench_training", metadata={"help": "folder for the results"})
    hidden_size: int = field(default=256, metadata={"help": "model width D"})
    intermediate_size: int = field(default=704, metadata={"help": "width of the dense feed-forward layers"})
    num_hidden_layers: int = field(default=4, metadata={"help": "blocks, the later half of them MoT"})
    group_size: int = field(default=32, metadata={"help": "rows G of a group"})
    num_experts: int = field(default=32, metadata={"help": "experts E"})
    vocab_size: int = field(default=4096, metadata={"help": "size of the vocabulary"})
    num_rows: int = field(default=128, metadata={"help": "rows B of a micro-batch"})
    num_columns: int = field(default=128, metadata={"help": "tokens T of a row"})
    num_rounds: int = field(default=7, metadata={"help": "rounds, after one that is not counted"})
    device: str = field(default="cpu", metadata={"help": "device"})
    bf16: bool = field(default=False, metadata={"help": "whether to use bfloat16 autocast"})
    torch_compile: bool = field(default=False, metadata={"help": "whether to compile the models"})


def make_models(args: Arguments) -> dict[str, MoTForCausalLM]:
    """Make the dense model, and the MoT model twice."""
    shared = {
        "vocab_size": args.vocab_size,
        "hidden_size": args.hidden_size,
        "intermediate_size": args.intermediate_size,
        "num_hidden_layers": args.num_hidden_layers,
        "num_attention_heads": max(1, args.hidden_size // 64),
        "max_position_embeddings": args.num_columns,
        "group_size": args.group_size,
        "num_experts": args.num_experts,
    }
    dense = MoTForCausalLM(MoTConfig(**shared, mlp_layer_types=["dense"] * args.num_hidden_layers))
    models = {"dense": dense, "MoT": MoTForCausalLM(MoTConfig(**shared))}
    models["MoT, monitored"] = MoTForCausalLM(MoTConfig(**shared))
    watch(models["MoT, monitored"])
    return {name: model.to(args.device).train() for name, model in models.items()}


def watch(model: MoTForCausalLM) -> None:
    """Let a monitor look at every step, and forget what it saw."""
    arguments = TrainingArguments(report_to="none", logging_steps=1)
    monitor = MixingMonitor(Trainer(model, arguments))
    state, control = TrainerState(logging_steps=1), TrainerControl()
    monitor.log = lambda values: None
    monitor.on_train_begin(arguments, state, control, model=model)

    def begin(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        monitor.on_step_begin(arguments, state, control)

    def end(module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        monitor.on_step_end(arguments, state, control)
        monitor.on_log(arguments, state, control, logs={"loss": 0.0})

    model.register_forward_pre_hook(begin)
    model.register_forward_hook(end)


def time_step(
    model: MoTForCausalLM,
    optimizer: torch.optim.Optimizer,
    ids: Tensor,
    args: Arguments,
    clock: Callable[[], float],
) -> dict[str, float]:
    """Seconds of each phase of one training step on rows `[B, T]`."""
    start = clock()
    with torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.bf16):
        loss = model(ids, labels=ids, use_cache=False).loss
    forward = clock()
    loss.backward()
    backward = clock()
    optimizer.step()
    optimizer.zero_grad()
    return dict(zip(PHASES, (forward - start, backward - forward, clock() - backward), strict=True))


def count_flops(model: MoTForCausalLM, ids: Tensor) -> int:
    """FLOPs of forward and backward of a step, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad()
    return counter.get_total_flops()


def measure(args: Arguments) -> list[dict[str, Any]]:
    """Take steps with all models in turn, round after round."""

    def clock() -> float:
        if args.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    models = make_models(args)
    optimizers = {name: torch.optim.AdamW(model.parameters()) for name, model in models.items()}
    ids = torch.randint(args.vocab_size, (args.num_rows, args.num_columns), device=args.device)
    flops = {name: count_flops(model, ids) for name, model in models.items()}
    if args.torch_compile:
        for model in models.values():
            model.compile()
    rounds = [
        {name: time_step(model, optimizers[name], ids, args, clock) for name, model in models.items()}
        for _ in range(args.num_rounds + 1)
    ][1:]
    return [summarize(name, phases, rounds, flops) for name in models for phases in (("forward", "backward"), *PHASES)]


def summarize(
    name: str, phases: tuple[str, ...] | str, rounds: list[dict[str, dict[str, float]]], flops: dict[str, int]
) -> dict[str, Any]:
    """Medians over rounds of the time that some phases take together."""
    phases = (phases,) if isinstance(phases, str) else phases
    seconds = [{model: sum(times[phase] for phase in phases) for model, times in one.items()} for one in rounds]
    ratios = [one[name] / one["dense"] for one in seconds]
    lower, _, upper = quantiles(ratios, n=4)
    return {
        "model": name,
        "phase": " and ".join(phases),
        "seconds": median(one[name] for one in seconds),
        "relative_time": median(ratios),
        "relative_time_quartiles": [lower, upper],
        "relative_flops": flops[name] / flops["dense"] if len(phases) > 1 else None,
    }


def print_table(results: list[dict[str, Any]], console: Console) -> None:
    """Print seconds, and the time relative to the dense model with its quartiles."""
    table = Table(title="a training step; relative to the dense model in the same round")
    for column in ("model", "phase", "seconds", "relative time", "quartiles", "relative FLOPs"):
        table.add_column(column, justify="left" if column in ("model", "phase") else "right")
    for result in results:
        table.add_row(
            result["model"],
            result["phase"],
            f"{result['seconds']:.3f}",
            f"{result['relative_time']:.3f}",
            " to ".join(f"{ratio:.3f}" for ratio in result["relative_time_quartiles"]),
            "" if result["relative_flops"] is None else f"{result['relative_flops']:.3f}",
            end_section=result["phase"] == PHASES[-1],
        )
    console.print(table)


def main(args: Arguments) -> None:
    """Time all models, then write and print the results."""
    set_seed(0)
    results = measure(args)
    console = Console()
    print_table(results, console)
    on_gpu = args.device.startswith("cuda")
    if not on_gpu:
        for result in results:
            del result["seconds"]  # of no use on another machine
    record = {
        "results": results,
        "arguments": asdict(args),
        "machine": torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    path = Path(args.output_dir) / "training.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    console.print(f"numbers   {path}")


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
