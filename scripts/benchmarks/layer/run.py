r"""Measure one feed-forward layer on its own: MoT against its alternatives, side by side.

The candidates have the same input, about the same FLOPs and, except for the dense layer, the same parameters:

- `dense`: the reference, the SwiGLU layer of Qwen3 that a MoT layer replaces;
- `cross_example`: a MoT layer as it trains, with the statistics of its groups;
- `einsum`: the same computation in plain einsums, with a copy at every change of layout and without statistics;
- `qwen3_moe`: the layer of Qwen3-MoE, in which a token goes to the K = E / G experts that the router likes best;
- `per_sequence` and `moe`: the MoT layer in its other modes, with the same K.

They take turns, round after round, in a forward pass without gradients and in a forward and a backward pass. Each turn
begins with a run that is not timed: it gets back the memory that the system took from an idle candidate. A time is the
median over rounds of the ratio to the dense layer in the same round. FLOPs are those of matrix products that torch
sees, which are not those in kernels of Triton; the share of the matmul rate is their speed relative to one large
product. Peak memory is what a run takes beyond parameters and input; a backward pass includes the gradients of all
parameters. Close other programs. Writes layer.json, layer.md and layer.png into --output_dir, with absolute times only
on a GPU. The stored results:

    python -m scripts.benchmarks.layer.run --hidden_sizes 256 512 --num_rounds 5 \
        --output_dir scripts/benchmarks/layer/results/cpu

    python -m scripts.benchmarks.layer.run --device cuda --dtype bfloat16 --hidden_sizes 2048 --num_tokens 65536 \
        --candidates cross_example qwen3_moe per_sequence moe --phases forward+backward --num_rounds 5 \
        --output_dir scripts/benchmarks/layer/results/h100

All sizes on a GPU, eager and compiled:

    python -m scripts.benchmarks.layer.run --device cuda --dtype bfloat16 --num_tokens 16384 65536 \
        --output_dir scripts/benchmarks/layer/results/gpu_eager
    python -m scripts.benchmarks.layer.run --device cuda --dtype bfloat16 --num_tokens 16384 65536 \
        --torch_compile true \
        --output_dir scripts/benchmarks/layer/results/gpu_compiled
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from math import lcm
from typing import Any, Literal

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn
from transformers import HfArgumentParser, set_seed
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from mot_hf import MoTConfig
from mot_hf.modeling.companions_mot import form_groups, update_companions
from mot_hf.modeling.mixing_mot import MixingContext, find_position_buckets
from mot_hf.modeling.modeling_mot import MoTSparseBlock
from scripts.benchmarks.measuring import (
    Work,
    count_flops,
    describe_machine,
    measure_matmul_rate,
    measure_peak_memory,
    summarize_times,
    time_in_turn,
)
from scripts.benchmarks.results import describe_arguments, write_results

REFERENCE = "dense"
CANDIDATES = {
    REFERENCE: "dense",
    "cross_example": "MoT cross_example",
    "einsum": "einsum with copies",
    "qwen3_moe": "Qwen3-MoE",
    "per_sequence": "MoT per_sequence",
    "moe": "MoT moe",
}
PHASES = ("forward", "forward+backward")
MEASURES: dict[str, Callable[[dict[str, Any]], str]] = {
    "relative time": lambda result: f"{result['relative_time']:.2f}",
    "quartiles": lambda result: " to ".join(f"{ratio:.2f}" for ratio in result["relative_time_quartiles"]),
    "relative FLOPs": lambda result: f"{result['relative_flops']:.2f}",
    "of matmul rate": lambda result: f"{result['share_of_matmul_rate']:.0%}",
    "peak MB": lambda result: f"{result['peak_memory_bytes'] / 1e6:,.1f}",
}
# Standard deviation of the controller's logits: some tokens of a group count more than others, but none alone.
LOGIT_STD = 2.0


@dataclass
class Arguments:
    """Sizes and repetitions."""

    output_dir: str = field(default="runs/layer", metadata={"help": "folder for the results"})
    hidden_sizes: list[int] = field(default_factory=lambda: [256, 512, 1024, 2048], metadata={"help": "widths D"})
    num_tokens: list[int] = field(default_factory=lambda: [16384], metadata={"help": "numbers of tokens B * T"})
    num_columns: int = field(default=256, metadata={"help": "tokens T of a row"})
    group_size: int = field(default=32, metadata={"help": "rows G of a group"})
    experts_per_member: list[int] = field(default_factory=lambda: [1, 8], metadata={"help": "values of E / G"})
    width_ratio: float = field(default=2.75, metadata={"help": "width of the dense layer by D, before rounding"})
    candidates: list[str] = field(
        default_factory=lambda: list(CANDIDATES),
        metadata={"help": f"any of {', '.join(CANDIDATES)}; dense is always measured"},
    )
    phases: list[str] = field(default_factory=lambda: list(PHASES), metadata={"help": f"any of {', '.join(PHASES)}"})
    num_rounds: int = field(default=7, metadata={"help": "rounds, after one that is not counted"})
    device: str = field(default="cpu", metadata={"help": "device"})
    dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata={"help": "dtype of all tensors"})
    torch_compile: bool = field(default=False, metadata={"help": "whether to compile the candidates"})

    def __post_init__(self) -> None:
        """Refuse what cannot be measured, before measuring anything."""
        for name, known in (("candidates", CANDIDATES), ("phases", PHASES)):
            for word in getattr(self, name):
                if word not in known:
                    raise ValueError(f"`{name}` has {word!r}, which must be one of {', '.join(known)}.")
        if min(self.experts_per_member) < 1:
            raise ValueError(f"`experts_per_member` must be at least 1, got {self.experts_per_member}.")
        if self.num_rounds < 2:
            raise ValueError(f"`num_rounds` must be at least 2 for quartiles, got {self.num_rounds}.")
        step = self.group_size * self.num_columns
        for num_tokens in self.num_tokens:
            if num_tokens < 1 or num_tokens % step != 0:
                raise ValueError(
                    f"`num_tokens` has {num_tokens}, which must be a multiple of group_size * num_columns = "
                    f"{self.group_size} * {self.num_columns} = {step}, so that groups are full: give "
                    f"{max(1, -(-num_tokens // step)) * step}, or fewer `num_columns`."
                )


class MoTLayer(nn.Module):
    """A MoT layer in one mode, for position buckets `[B, T]` and groups that a model finds once for all layers."""

    def __init__(self, block: MoTSparseBlock, mode: str, buckets: Tensor) -> None:
        super().__init__()
        self.block, self.mode, self.buckets = block, mode, buckets
        self.groups = form_groups(buckets, None, block.config.group_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map tokens `[B, T, D]` to outputs of the same shape."""
        gathers = self.mode == "cross_example"
        context = MixingContext(self.mode, self.buckets, gathers=gathers)
        context.groups = self.groups
        output = self.block(hidden_states, context)
        if gathers:  # kept, or compiled code would leave them out
            self.statistics = context.average(self.block.layer_idx, self.block.config.group_size)
        return output


class EinsumLayer(nn.Module):
    """Mode `cross_example` for full groups in plain einsums, with the parameters of a MoT layer."""

    def __init__(self, block: MoTSparseBlock) -> None:
        super().__init__()
        self.gate, self.experts, self.group_size = block.gate, block.experts, block.config.group_size

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map tokens `[B, T, D]` to outputs of the same shape."""
        x = hidden_states.unflatten(0, (-1, self.group_size)).transpose(1, 2).contiguous()  # [A, T, G, D]
        x = x.flatten(0, 1)  # [N, G, D]
        logits = torch.einsum("ngd,ed->nge", x.float(), self.gate.weight.float())
        w = logits.softmax(dim=1).to(x.dtype)  # [N, G, E]
        mixture = torch.einsum("nge,ngd->end", w, x).contiguous()
        gate, up = torch.einsum("end,efd->enf", mixture, self.experts.gate_up_proj).chunk(2, dim=-1)
        y = torch.einsum("enf,edf->end", F.silu(gate) * up, self.experts.down_proj)
        output = torch.einsum("nge,ned->ngd", w, y.transpose(0, 1).contiguous())
        output = output.unflatten(0, (-1, hidden_states.shape[1])).transpose(1, 2).contiguous()  # [A, G, T, D]
        return output.view_as(hidden_states)


def make_config(args: Arguments, hidden_size: int, experts_per_member: int) -> MoTConfig:
    """The sizes of all candidates; for every value of `experts_per_member`, experts are multiples of 8 wide."""
    step = 8 * lcm(*args.experts_per_member)
    config = MoTConfig(
        hidden_size=hidden_size,
        intermediate_size=max(1, round(args.width_ratio * hidden_size / step)) * step,
        num_hidden_layers=1,
        num_attention_heads=1,
        group_size=args.group_size,
        num_experts=experts_per_member * args.group_size,
        norm_topk_prob=False,
    )
    config._experts_implementation = "grouped_mm"
    return config


@torch.no_grad()
def make_modules(config: MoTConfig, x: Tensor, buckets: Tensor) -> tuple[Qwen3MLP, MoTSparseBlock]:
    """A dense and a MoT layer with random weights; the latter has the statistics of the input."""
    with x.device:
        dense, block = Qwen3MLP(config).to(x.dtype), MoTSparseBlock(config, layer_idx=0).to(x.dtype)
    for weight in (*dense.parameters(), *block.parameters()):
        nn.init.normal_(weight, std=0.02)
    nn.init.normal_(block.gate.weight, std=LOGIT_STD / config.hidden_size**0.5)
    context = MixingContext("cross_example", buckets)
    block(x, context)
    statistics, num_tokens = context.average(0, config.group_size)
    update_companions([block.companions], [statistics], num_tokens)
    return dense, block


def make_qwen3_moe(block: MoTSparseBlock) -> Qwen3MoeSparseMoeBlock:
    """The layer of Qwen3-MoE with the parameters of a MoT layer."""
    with torch.device("meta"):
        moe = Qwen3MoeSparseMoeBlock(block.config)
    moe.gate.weight = block.gate.weight
    moe.experts.gate_up_proj, moe.experts.down_proj = block.experts.gate_up_proj, block.experts.down_proj
    return moe


def make_layers(config: MoTConfig, x: Tensor, candidates: list[str]) -> dict[str, nn.Module]:
    """The candidates by name, the dense layer first."""
    buckets = find_position_buckets(x, None, None, 0)
    dense, block = make_modules(config, x, buckets)
    makers: dict[str, Callable[[], nn.Module]] = {
        "dense": lambda: dense,
        "einsum": lambda: EinsumLayer(block),
        "qwen3_moe": lambda: make_qwen3_moe(block),
    }
    names = [name for name in CANDIDATES if name == REFERENCE or name in candidates]
    return {name: makers[name]() if name in makers else MoTLayer(block, name, buckets) for name in names}


def make_work(layer: nn.Module, x: Tensor, gradient: Tensor, phase: str) -> Work:
    """The work to time."""
    parameters, tokens = list(layer.parameters()), x.detach()

    @torch.no_grad()
    def infer() -> None:
        layer(tokens)

    def train() -> None:
        layer(x).backward(gradient)
        for tensor in (x, *parameters):
            tensor.grad = None

    return infer if phase == "forward" else train


def measure_cell(args: Arguments, config: MoTConfig, num_tokens: int, rate: float) -> list[dict[str, Any]]:
    """Measure all candidates at one width, number of tokens and number of experts."""
    set_seed(0)
    shape = (num_tokens // args.num_columns, args.num_columns, config.hidden_size)
    x, gradient = (torch.randn(shape, device=args.device, dtype=getattr(torch, args.dtype)) for _ in range(2))
    layers = make_layers(config, x.requires_grad_(), args.candidates)
    works = {
        phase: {name: make_work(layer, x, gradient, phase) for name, layer in layers.items()} for phase in args.phases
    }
    flops = {phase: {name: count_flops(work) for name, work in works[phase].items()} for phase in args.phases}
    if args.torch_compile:
        torch.compiler.reset()  # each cell needs its own versions, and torch keeps few of one function
        for name, layer in layers.items():
            layer.compile(dynamic=False, fullgraph=name != "qwen3_moe")
    sizes = {name: getattr(config, name) for name in ("hidden_size", "intermediate_size", "num_experts")}
    return [
        {**sizes, "num_tokens": num_tokens, "phase": phase, **result}
        for phase in args.phases
        for result in measure_phase(args, works[phase], flops[phase], rate)
    ]


def measure_phase(args: Arguments, works: dict[str, Work], flops: dict[str, int], rate: float) -> list[dict[str, Any]]:
    """Time all candidates in turn, then measure their memory."""
    timings = summarize_times(time_in_turn(works, args.num_rounds, args.device, min_seconds=0.02), REFERENCE)
    results = []
    for name, timing in timings.items():
        result = {
            "candidate": name,
            "relative_time": timing.relative_time,
            "relative_time_quartiles": list(timing.relative_time_quartiles),
            "flops": flops[name],
            "relative_flops": flops[name] / flops[REFERENCE],
            "share_of_matmul_rate": flops[name] / timing.seconds / rate,
            "peak_memory_bytes": measure_peak_memory(works[name], args.device),
        }
        # Seconds of a CPU are of no use on another machine.
        results.append({**result, "seconds": timing.seconds} if args.device.startswith("cuda") else result)
    return results


def group_results(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The candidates' results by the cell and phase that they share."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        name = "D {hidden_size}, {num_tokens} tokens, E {num_experts}, {phase}".format(**result)
        groups.setdefault(name, []).append(result)
    return groups


def print_tables(results: list[dict[str, Any]], console: Console) -> None:
    """Print the results of one cell."""
    for name, group in group_results(results).items():
        numbers = [Column(measure, justify="right") for measure in MEASURES]
        table = Table(Column("candidate", no_wrap=True), *numbers, title=name)
        for result in group:
            table.add_row(CANDIDATES[result["candidate"]], *(show(result) for show in MEASURES.values()))
        console.print(table)


def summarise(results: list[dict[str, Any]]) -> str:
    """A table in Markdown for each measure, with a column for each candidate."""
    names = dict.fromkeys(CANDIDATES[result["candidate"]] for result in results)
    lines = ["# One feed-forward layer; times and FLOPs are relative to the dense layer"]
    for title, show in MEASURES.items():
        lines += [f"\n## {title}\n", f"| | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
        lines += [f"| {name} | {' | '.join(map(show, group))} |" for name, group in group_results(results).items()]
    return "\n".join(lines) + "\n"


def draw(results: list[dict[str, Any]]) -> Figure:
    """Speed over width: a row of panels for each number of tokens and of experts, a column for each phase."""
    rows = list(dict.fromkeys((result["num_tokens"], result["num_experts"]) for result in results))
    phases = list(dict.fromkeys(result["phase"] for result in results))
    figure = Figure(figsize=(5 * len(phases), 3.2 * len(rows) + 0.5), layout="constrained")
    panels = figure.subplots(len(rows), len(phases), squeeze=False, sharey=True)
    for (row, (num_tokens, num_experts)), (column, phase) in product(enumerate(rows), enumerate(phases)):
        wanted = {"num_tokens": num_tokens, "num_experts": num_experts, "phase": phase}
        draw_panel(panels[row, column], [result for result in results if wanted.items() <= result.items()])
        panels[row, column].set_title(f"{phase}, E = {num_experts}, {num_tokens} tokens", fontsize=10)
    legend = {"loc": "outside lower center", "ncols": len(phases) + 1, "frameon": False}
    figure.legend(*panels[0, 0].get_legend_handles_labels(), **legend)
    return figure


def draw_panel(axes: Any, results: list[dict[str, Any]]) -> None:
    """Draw one line for each candidate, and one at the speed of the dense layer."""
    widths = sorted({result["hidden_size"] for result in results})
    for place, (name, label) in enumerate(CANDIDATES.items()):
        speeds = [1 / result["relative_time"] for result in results if result["candidate"] == name]
        if name == REFERENCE:
            axes.axhline(1.0, color="black", linewidth=1, label=label)
        elif speeds:
            axes.plot(widths, speeds, marker="o", markersize=4, color=f"C{place - 1}", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(widths, map(str, widths))
    axes.set_xlabel("width D")
    axes.set_ylabel("speed relative to dense")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def main(args: Arguments) -> None:
    """Measure cell after cell, and write the results after each."""
    sizes = product(sorted(args.hidden_sizes), args.num_tokens, args.experts_per_member)
    cells = [(make_config(args, hidden_size, members), num_tokens) for hidden_size, num_tokens, members in sizes]
    on_gpu = args.device.startswith("cuda")
    rate = measure_matmul_rate(args.device, getattr(torch, args.dtype))
    machine = describe_machine(args.device)
    record: dict[str, Any] = {"arguments": describe_arguments(args), "machine": machine, "results": []}
    if on_gpu:
        record["matmul_flops_per_second"] = rate
    console = Console()
    for config, num_tokens in cells:
        results = measure_cell(args, config, num_tokens, rate)
        gc.collect()  # modules and compiled code hold on to parameters, and there is no memory for those of two cells
        print_tables(results, console)
        record["results"] += results
        write_results(args.output_dir, "layer", record, summarise(record["results"]), draw(record["results"]))
    console.print(f"results   {args.output_dir}")


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
