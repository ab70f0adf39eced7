"""Measure what a training step costs: a MoT model against the dense model of equal FLOPs, side by side.

Both models have the same attention, embeddings and dense layers; a MoT layer's experts together do the work of the
dense layer that it replaces. A round takes one step with each model, in turn; a figure is the median over rounds, of
times and of ratios to the dense model in the same round. The optimizer (AdamW) is timed by itself: it has `group_size`
times the parameters to update in a MoT layer, however many tokens a step has. Last comes the share of a step that
`MixingMonitor` adds to those that log. Close other programs. Writes
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
from mot_hf.modeling.modeling_mot import MoTSparseBlock
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
    """Make the dense model and the MoT model."""
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
    return {name: model.to(args.device).train() for name, model in models.items()}


class TimedMonitor(MixingMonitor):
    """A monitor that looks at every step, and adds up the time that it takes.

    Args:
        model (`MoTForCausalLM`): The model.
        clock (`Callable`): Tells the time, when all work is done.
    """

    def __init__(self, model: MoTForCausalLM, clock: Callable[[], float]) -> None:
        arguments = TrainingArguments(report_to="none")
        super().__init__(Trainer(model, arguments))
        self.log = lambda values: None
        self.clock, self.seconds = clock, 0.0
        self.context = (arguments, TrainerState(logging_steps=1), TrainerControl())
        self.on_train_begin(*self.context, model=model)

    def _make_recorder(self, layer: MoTSparseBlock) -> Callable[..., None]:
        record = super()._make_recorder(layer)
        return lambda *inputs: self.add_time(lambda: record(*inputs))

    def add_time(self, work: Callable[[], None]) -> None:
        """Do some work of the monitor."""
        start = self.clock()
        work()
        self.seconds += self.clock() - start

    def finish_step(self) -> float:
        """Log; returns the seconds since the last time."""
        self.on_step_end(*self.context)
        self.add_time(lambda: self.on_log(*self.context, logs={"loss": 0.0}))
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def measure_monitor(
    model: MoTForCausalLM, ids: Tensor, args: Arguments, num_rounds: int, clock: Callable[[], float]
) -> float:
    """Share of a step's forward and backward that the monitor adds to a step that logs: the median."""
    monitor, optimizer, shares = TimedMonitor(model, clock), torch.optim.AdamW(model.parameters()), []
    for _ in range(num_rounds + 1):
        monitor.on_step_begin(*monitor.context)
        seconds = time_step(model, optimizer, ids, args, clock)
        watching = monitor.finish_step()
        shares.append(watching / (seconds["forward"] + seconds["backward"] - watching))
    return median(shares[1:])


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


def measure(args: Arguments) -> tuple[list[dict[str, Any]], float]:
    """Take steps with both models in turn, round after round, then some with a monitor."""

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
    results = [
        summarize(name, phases, rounds, flops) for name in models for phases in (("forward", "backward"), *PHASES)
    ]
    return results, measure_monitor(models["MoT"], ids, args, args.num_rounds, clock)


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
    """Time both models and the monitor, then write and print the results."""
    set_seed(0)
    results, monitor_share = measure(args)
    console = Console()
    print_table(results, console)
    console.print(f"the monitor adds {monitor_share:.2%} to a step that logs")
    on_gpu = args.device.startswith("cuda")
    if not on_gpu:
        for result in results:
            del result["seconds"]  # of no use on another machine
    record = {
        "results": results,
        "monitor_share_of_a_logging_step": monitor_share,
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
