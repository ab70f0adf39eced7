r"""Measure what a training step of a whole model costs: MoT against the dense model and Qwen3-MoE, side by side.

All models have the same attention, embeddings, dense layers and FLOPs per token:

- dense: no MoT layers; the reference;
- MoT `cross_example`: a MoT model as it trains; `per_sequence` and `moe`: the same model trained in its other modes;
- Qwen3-MoE: that of transformers with the parameters of the MoT model, K = E / G experts a token, the kernel
  `grouped_mm` and the load-balancing loss, which mode `moe` has too.

In a round, each of them takes two steps, and the second counts. A figure is the median over rounds of times relative
to the dense model in the same round. The optimizer (AdamW, fused, the `Trainer`'s default) is timed separately: in a
MoT layer it has `group_size` times the parameters to update, however many tokens a step has. FLOPs are those of
forward and backward; the "share of the matmul rate" is their speed relative to one large product. Peak memory is what
forward and backward take beyond parameters and optimizer, with all gradients. `MixingMonitor` is timed too, as a share
of the steps that log (never compiled). Close other programs. Writes train.json, train.md and train.png into
--output_dir, with absolute speeds only on a GPU. The stored results:

    python -m scripts.benchmarks.train_step.run --hidden_sizes 256 --num_rounds 5 \
        --output_dir scripts/benchmarks/train_step/results/cpu

On a GPU, eager and compiled. `--bf16 true` is autocast, which does not cover `grouped_mm`: in Qwen3-MoE and mode
`moe`, the experts then multiply in the dtype of their parameters, float32, and are slow. With `--dtype bfloat16` they
are not:

    python -m scripts.benchmarks.train_step.run --device cuda --bf16 true --num_rows 256 --hidden_sizes 512 1024 \
        --output_dir scripts/benchmarks/train_step/results/gpu_eager
    python -m scripts.benchmarks.train_step.run --device cuda --dtype bfloat16 --num_rows 256 --hidden_sizes 512 1024 \
        --output_dir scripts/benchmarks/train_step/results/gpu_eager_bfloat16
    python -m scripts.benchmarks.train_step.run --device cuda --dtype bfloat16 --num_rows 256 --hidden_sizes 512 1024 \
        --torch_compile true --output_dir scripts/benchmarks/train_step/results/gpu_compiled_bfloat16
"""

import copy
import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from math import gcd
from statistics import median
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor
from transformers import (
    HfArgumentParser,
    PreTrainedModel,
    Qwen3MoeForCausalLM,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from mot_hf import MoTConfig, MoTForCausalLM
from mot_hf.conversion.export import make_qwen3_moe_config
from mot_hf.training import MixingMonitor
from scripts.benchmarks.measuring import (
    count_flops,
    describe_machine,
    measure_matmul_rate,
    measure_peak_memory,
    read_clock,
    summarize_times,
)
from scripts.benchmarks.results import describe_arguments, write_results

REFERENCE = "dense"
# What is reported, and the phases that add up to it.
SPANS = {
    "forward": ("forward",),
    "backward": ("backward",),
    "forward and backward": ("forward", "backward"),
    "optimizer": ("optimizer",),
    "step": ("forward", "backward", "optimizer"),
}


@dataclass
class Arguments:
    """Sizes and repetitions."""

    output_dir: str = field(default="runs/train_step", metadata={"help": "folder for the results"})
    hidden_sizes: list[int] = field(default_factory=lambda: [256, 512], metadata={"help": "model widths D"})
    width_ratio: float = field(default=2.75, metadata={"help": "width of the dense layers by D, before rounding"})
    num_hidden_layers: int = field(default=4, metadata={"help": "blocks, the later half of them MoT"})
    group_size: int = field(default=32, metadata={"help": "rows G of a group"})
    num_experts: list[int] = field(default_factory=lambda: [32, 256], metadata={"help": "numbers of experts E"})
    vocab_size: int = field(default=4096, metadata={"help": "size of the vocabulary"})
    num_rows: int = field(default=128, metadata={"help": "rows B of a micro-batch"})
    num_columns: int = field(default=128, metadata={"help": "tokens T of a row"})
    num_rounds: int = field(default=7, metadata={"help": "rounds, after one that is not counted"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "whether backward recomputes the blocks"})
    device: str = field(default="cpu", metadata={"help": "device"})
    dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata={"help": "dtype of the parameters"})
    bf16: bool = field(default=False, metadata={"help": "whether to use bfloat16 autocast"})
    torch_compile: bool = field(default=False, metadata={"help": "whether to compile the models"})

    def __post_init__(self) -> None:
        """Refuse what cannot be compared, before measuring anything."""
        if self.num_rows % self.group_size != 0:
            raise ValueError(
                f"`num_rows` must be a multiple of `group_size` ({self.group_size}), so that groups are full, "
                f"got {self.num_rows}."
            )
        if self.num_rounds < 2:
            raise ValueError(f"`num_rounds` must be at least 2 for quartiles, got {self.num_rounds}.")

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU, whose absolute times are worth storing."""
        return self.device.startswith("cuda")


@dataclass
class Candidate:
    """A model in one mode, its optimizer, and the arguments of its calls."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    call: dict[str, Any]

    def compute_loss(self, ids: Tensor, args: Arguments) -> Tensor:
        """The loss on rows `[B, T]`."""
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=args.bf16):
            return self.model(ids, labels=ids, use_cache=False, **self.call).loss

    def run_backward(self, ids: Tensor, args: Arguments) -> None:
        """Forward and backward on rows `[B, T]`, without keeping gradients."""
        self.compute_loss(ids, args).backward()
        self.optimizer.zero_grad()

    def time_step(self, ids: Tensor, args: Arguments) -> dict[str, float]:
        """Seconds of each phase of a step on rows `[B, T]`."""
        start = read_clock(args.device)
        loss = self.compute_loss(ids, args)
        forward = read_clock(args.device)
        loss.backward()
        backward = read_clock(args.device)
        self.optimizer.step()
        self.optimizer.zero_grad()
        optimizer = read_clock(args.device)
        return {"forward": forward - start, "backward": backward - forward, "optimizer": optimizer - backward}

    def take_turn(self, ids: Tensor, args: Arguments) -> dict[str, float]:
        """As `time_step`, after a step that gets back the memory that the system took while other models ran."""
        self.time_step(ids, args)
        return self.time_step(ids, args)


def make_config(args: Arguments, hidden_size: int, num_experts: int) -> MoTConfig:
    """The sizes of all models; experts are a multiple of 8 wide, as `grouped_mm` needs in bfloat16."""
    step = 8 * num_experts // gcd(num_experts, args.group_size)
    return MoTConfig(
        vocab_size=args.vocab_size,
        hidden_size=hidden_size,
        intermediate_size=max(1, round(args.width_ratio * hidden_size / step)) * step,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=max(1, hidden_size // 64),
        max_position_embeddings=args.num_columns,
        group_size=args.group_size,
        num_experts=num_experts,
        norm_topk_prob=False,  # where K is 1 the router would learn nothing
    )


def make_candidates(args: Arguments, config: MoTConfig) -> dict[str, Candidate]:
    """Make the models, each with its optimizer once: the modes of MoT share theirs."""
    models = make_models(args, config)
    optimizers = {name: torch.optim.AdamW(model.parameters(), fused=True) for name, model in models.items()}
    balanced = {"output_router_logits": True}
    calls = {
        REFERENCE: ("dense", {}),
        "MoT cross_example": ("mot", {"mixing": "cross_example"}),
        "MoT per_sequence": ("mot", {"mixing": "per_sequence"}),
        "MoT moe": ("mot", {"mixing": "moe", **balanced}),
        "Qwen3-MoE": ("qwen3_moe", balanced),
    }
    return {name: Candidate(models[model], optimizers[model], call) for name, (model, call) in calls.items()}


def make_models(args: Arguments, config: MoTConfig) -> dict[str, PreTrainedModel]:
    """The dense model, the MoT model, and a Qwen3-MoE model with the MoT model's parameters."""
    dense_config = copy.deepcopy(config)
    dense_config.mlp_layer_types = ["dense"] * config.num_hidden_layers
    with torch.device(args.device):
        dense, mot = MoTForCausalLM(dense_config), MoTForCausalLM(config)
        moe = Qwen3MoeForCausalLM(make_qwen3_moe_config(config))
    moe.load_state_dict({name: value for name, value in mot.state_dict().items() if ".companions." not in name})
    models = {"dense": dense, "mot": mot, "qwen3_moe": moe}
    for model in models.values():
        model.to(getattr(torch, args.dtype)).train()
        model.set_experts_implementation("grouped_mm")
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable()
    return models


def measure_monitor(candidate: Candidate, ids: Tensor, args: Arguments) -> float:
    """Share of a step's forward and backward that the monitor adds to a step that logs: the median."""
    monitor, seconds, shares = MixingMonitor(SimpleNamespace(log=lambda values: None)), [], []

    def clocked(work: Callable[..., None]) -> Callable[..., None]:
        def run(*inputs: Any, **options: Any) -> None:
            start = read_clock(args.device)
            work(*inputs, **options)
            seconds.append(read_clock(args.device) - start)

        return run

    monitor.on_log, monitor.record = clocked(monitor.on_log), clocked(monitor.record)
    context = (TrainingArguments(report_to="none"), TrainerState(logging_steps=1), TrainerControl())
    monitor.on_train_begin(*context, model=candidate.model)
    for _ in range(args.num_rounds + 1):
        seconds.clear()
        monitor.on_step_begin(*context)
        step = candidate.time_step(ids, args)
        rest = step["forward"] + step["backward"] - sum(seconds)
        monitor.on_step_end(*context)
        monitor.on_log(*context, logs={"loss": 0.0})
        shares.append(sum(seconds) / rest)
    monitor.on_train_end(*context)
    return median(shares[1:])


def measure_size(args: Arguments, config: MoTConfig, matmul_rate: float) -> dict[str, Any]:
    """Measure all models of one size."""
    set_seed(0)
    candidates = make_candidates(args, config)
    ids = torch.randint(config.vocab_size, (args.num_rows, args.num_columns), device=args.device)
    monitor_share = measure_monitor(candidates["MoT cross_example"], ids, args)
    works = {name: partial(candidate.run_backward, ids, args) for name, candidate in candidates.items()}
    flops = {name: count_flops(work) for name, work in works.items()}
    if args.torch_compile:
        torch.compiler.reset()  # or code for the sizes before would make this one's shapes dynamic
        for model in {candidate.model for candidate in candidates.values()}:
            model.compile(dynamic=False)
    turns = range(args.num_rounds + 1)
    rounds = [{name: candidate.take_turn(ids, args) for name, candidate in candidates.items()} for _ in turns]
    memory = {name: measure_peak_memory(work, args.device) for name, work in works.items()}
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_experts": config.num_experts,
        "monitor_share_of_a_logging_step": monitor_share,
        "models": summarize(args, rounds[1:], flops, memory, matmul_rate),
    }


def summarize(
    args: Arguments,
    rounds: list[dict[str, dict[str, float]]],
    flops: dict[str, int],
    memory: dict[str, int],
    matmul_rate: float,
) -> dict[str, dict[str, Any]]:
    """The figures of each model."""
    timings = {
        span: summarize_times(
            {name: [sum(times[name][phase] for phase in phases) for times in rounds] for name in flops}, REFERENCE
        )
        for span, phases in SPANS.items()
    }
    models = {}
    for name in flops:
        times = {span: asdict(timing[name]) for span, timing in timings.items()}
        seconds = {span: time.pop("seconds") for span, time in times.items()}
        models[name] = {
            "times": times,
            "optimizer_share_of_a_step": seconds["optimizer"] / seconds["step"],
            "flops": flops[name],
            "relative_flops": flops[name] / flops[REFERENCE],
            "share_of_matmul_rate": flops[name] / seconds["forward and backward"] / matmul_rate,
            "peak_memory_bytes": memory[name],
        }
        if args.on_gpu:  # of no use from another CPU
            models[name]["seconds"] = seconds
            models[name]["tokens_per_second"] = args.num_rows * args.num_columns / seconds["step"]
    return models


def tabulate(sizes: list[dict[str, Any]]) -> str:
    """A table in Markdown for each size."""
    lines = ["Times and FLOPs relative to the dense model; peak memory of forward and backward.", ""]
    for size in sizes:
        monitor = f"The monitor adds {size['monitor_share_of_a_logging_step']:.2%} to a step that logs."
        rows = {name: make_cells(model) for name, model in size["models"].items()}
        columns = list(rows[REFERENCE])
        lines += [f"D = {size['hidden_size']}, E = {size['num_experts']}. {monitor}", ""]
        lines += [f"| model | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
        lines += [f"| {name} | {' | '.join(cells.values())} |" for name, cells in rows.items()] + [""]
    return "\n".join(lines)


def make_cells(model: dict[str, Any]) -> dict[str, str]:
    """A model's line of the table, by column."""
    cells = {span: f"{time['relative_time']:.2f}" for span, time in model["times"].items()}
    cells["quartiles"] = " to ".join(f"{ratio:.2f}" for ratio in model["times"]["step"]["relative_time_quartiles"])
    cells["optimizer's share"] = f"{model['optimizer_share_of_a_step']:.1%}"
    cells["FLOPs"] = f"{model['relative_flops']:.3f}"
    cells["of matmul rate"] = f"{model['share_of_matmul_rate']:.0%}"
    cells["peak MB"] = f"{model['peak_memory_bytes'] / 1e6:,.0f}"
    if "tokens_per_second" in model:
        cells["tokens/s"] = f"{model['tokens_per_second']:,.0f}"
    return cells


def draw(sizes: list[dict[str, Any]]) -> Figure:
    """Relative times by phase, with their quartiles: a panel for each size."""
    figure = Figure(figsize=(max(7, 4.5 * len(sizes)), 4), layout="constrained")
    panels = figure.subplots(1, len(sizes), squeeze=False, sharey=True)[0]
    for axes, size in zip(panels, sizes, strict=True):
        for place, (name, model) in enumerate(size["models"].items()):
            times = model["times"].values()
            ratios = np.array([time["relative_time"] for time in times])
            spread = np.abs(np.array([time["relative_time_quartiles"] for time in times]).T - ratios)
            places = np.arange(len(times)) + 0.15 * (place - 2)
            axes.errorbar(places, ratios, spread, fmt="o", markersize=4, color=f"C{place}", label=name)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_locator(LogLocator(2, subs=(1.0, 1.25, 1.5, 1.75)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xticks(range(len(SPANS)), [span.replace(" and ", "\nand ") for span in SPANS], fontsize=8)
        axes.set_title(f"D = {size['hidden_size']}, E = {size['num_experts']}", fontsize=10)
        axes.grid(alpha=0.3, axis="y")
    panels[0].set_ylabel("time relative to the dense model")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return figure


def main(args: Arguments) -> None:
    """Measure size after size, and write the results after each."""
    configs = [make_config(args, *size) for size in product(args.hidden_sizes, args.num_experts)]
    dtype = torch.bfloat16 if args.bf16 else getattr(torch, args.dtype)
    matmul_rate = measure_matmul_rate(args.device, dtype)
    machine = describe_machine(args.device)
    record: dict[str, Any] = {"arguments": describe_arguments(args), "machine": machine, "sizes": []}
    if args.on_gpu:
        record["matmul_flops_per_second"] = matmul_rate
    for config in configs:
        record["sizes"].append(measure_size(args, config, matmul_rate))
        gc.collect()  # models refer to themselves, and two sizes do not fit in memory
        write_results(args.output_dir, "train", record, tabulate(record["sizes"]), draw(record["sizes"]))
        print(tabulate(record["sizes"][-1:]))


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
