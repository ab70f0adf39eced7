r"""Measure what the optimizer of a MoT model costs, and what helps.

A MoT layer has `group_size` times the parameters of the dense layer with the same FLOPs, so its price lies in
gradients and optimizer. For both models, each optimizer takes turns with a forward and backward pass of a micro-batch,
and steps with its gradients. The time of a step is relative to the pass in the same round; the median over rounds
counts. It does not depend on the number of tokens, so its share of a whole step falls with them: the share is computed
from the two times, for steps of several micro-batches. Bytes per parameter are those of the tensors, and what a step
takes beyond them at its peak. The bytes per device of sharded training are calculated from them.

Optimizers are made as the `Trainer` makes them for `--optim`; `adamw_torch` is the loop over parameters on a CPU and
"foreach" on a GPU. Those in bfloat16 have parameters, gradients and states in bfloat16, like a model that is loaded
with `dtype="bfloat16"`. torchao's compile themselves at the first step, on a CPU too. Optimizers that are not
installed are named and skipped. SGD, without momentum, is the least that an optimizer can do. Close other programs.
Writes optimizer.json, optimizer.md and optimizer.png into --output_dir, with absolute times only on a GPU. The stored
results:

    python -m scripts.benchmarks.optimizer.run --output_dir scripts/benchmarks/optimizer/results/cpu

On a GPU:

    python -m scripts.benchmarks.optimizer.run --device cuda --bf16 true --hidden_size 1024 --intermediate_size 2816 \
        --num_rows 128 --step_rows 128 512 2048 --output_dir scripts/benchmarks/optimizer/results/gpu
"""

import gc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import Optimizer
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

from mot_hf import MoTConfig, MoTForCausalLM
from scripts.benchmarks.measuring import describe_machine, measure_peak_memory, summarize_times, time_in_turn
from scripts.benchmarks.results import describe_arguments, write_results

PASS = "forward and backward"
HELD = ("parameters", "gradients", "states")


class Choice(NamedTuple):
    """An optimizer: the `Trainer`'s arguments, the dtype of the parameters, and options beyond the `Trainer`'s."""

    optim: str
    optim_args: str | None = None
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = {}  # noqa: RUF012


CHOICES = {
    "AdamW, loop": Choice("adamw_torch", options={"foreach": False}),
    "AdamW, foreach": Choice("adamw_torch", options={"foreach": True}),
    "AdamW, fused": Choice("adamw_torch_fused"),
    "AdamW, fused, bfloat16": Choice("adamw_torch_fused", dtype=torch.bfloat16),
    "8-bit AdamW, torchao": Choice("adamw_torch_8bit"),
    "8-bit AdamW, torchao, bfloat16": Choice("adamw_torch_8bit", "bf16_stochastic_round=True", torch.bfloat16),
    "8-bit AdamW, bitsandbytes": Choice("adamw_bnb_8bit"),
    "Adafactor": Choice("adafactor"),
    "SGD": Choice("sgd"),
}


@dataclass
class Arguments:
    """Sizes and repetitions."""

    output_dir: str = field(default="runs/optimizer", metadata={"help": "folder for the results"})
    optimizers: list[str] = field(
        default_factory=lambda: list(CHOICES), metadata={"help": f"any of {'; '.join(CHOICES)}: each in quotes"}
    )
    hidden_size: int = field(default=512, metadata={"help": "model width D"})
    intermediate_size: int = field(default=1408, metadata={"help": "width of the dense feed-forward layers"})
    num_hidden_layers: int = field(default=4, metadata={"help": "blocks, the later half of them MoT"})
    group_size: int = field(default=32, metadata={"help": "rows G of a group"})
    num_experts: int = field(default=32, metadata={"help": "experts E"})
    vocab_size: int = field(default=4096, metadata={"help": "size of the vocabulary"})
    num_rows: int = field(default=32, metadata={"help": "rows B of a micro-batch"})
    num_columns: int = field(default=128, metadata={"help": "tokens T of a row"})
    step_rows: list[int] = field(
        default_factory=lambda: [32, 128, 512], metadata={"help": "rows of a step, for the optimizer's share"}
    )
    num_devices: list[int] = field(
        default_factory=lambda: [8, 64], metadata={"help": "numbers of devices to shard over"}
    )
    num_rounds: int = field(default=7, metadata={"help": "rounds, after one that is not counted"})
    device: str = field(default="cpu", metadata={"help": "device"})
    bf16: bool = field(default=False, metadata={"help": "whether to use bfloat16 autocast in forward and backward"})

    def __post_init__(self) -> None:
        """Refuse what cannot be measured, before measuring anything."""
        for name in self.optimizers:
            if name not in CHOICES:
                raise ValueError(f"`optimizers` has {name!r}, which must be one of: {'; '.join(CHOICES)}.")
        for num_rows in [self.num_rows, *self.step_rows]:
            if num_rows % self.group_size != 0 or num_rows % self.num_rows != 0:
                raise ValueError(
                    f"`num_rows` ({self.num_rows}) must be a multiple of `group_size` ({self.group_size}), and "
                    f"`step_rows` multiples of `num_rows`, got {num_rows}."
                )
        if self.num_rounds < 2:
            raise ValueError(f"`num_rounds` must be at least 2 for quartiles, got {self.num_rounds}.")


def make_config(args: Arguments, is_dense: bool) -> MoTConfig:
    """The sizes of one of the two models."""
    return MoTConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=max(1, args.hidden_size // 64),
        max_position_embeddings=args.num_columns,
        mlp_layer_types=["dense"] * args.num_hidden_layers if is_dense else None,
        group_size=args.group_size,
        num_experts=args.num_experts,
    )


def compute_gradients(model: MoTForCausalLM, ids: Tensor, bf16: bool) -> None:
    """Forward and backward of a micro-batch `[B, T]`."""
    model.zero_grad()
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
        loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()


def take_parameters(model: MoTForCausalLM, dtype: torch.dtype) -> Sequence[Tensor]:
    """The parameters of a model, or copies in another dtype, all with gradients."""
    parameters = list(model.parameters())
    if all(parameter.dtype == dtype for parameter in parameters):
        return parameters
    copies = [parameter.detach().to(dtype).requires_grad_() for parameter in parameters]
    for copy, parameter in zip(copies, parameters, strict=True):
        copy.grad = cast(Tensor, parameter.grad).to(dtype)
    return copies


def make_optimizer(choice: Choice, parameters: Sequence[Tensor]) -> Optimizer:
    """The optimizer that the `Trainer` makes; raises ImportError if its library is not installed."""
    arguments = TrainingArguments(
        optim=choice.optim, optim_args=choice.optim_args, learning_rate=1e-6, report_to="none"
    )
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    return kind(parameters, **{**options, **choice.options})


def count_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of the memory behind tensors, also of tensors made of several; shared memory counts once."""
    parts, memory = [tensor for tensor in tensors if isinstance(tensor, Tensor)], {}
    while parts:
        tensor = parts.pop()
        if flatten := getattr(tensor, "__tensor_flatten__", None):
            parts += [getattr(tensor, name) for name in flatten()[0]]
        else:
            storage = tensor.untyped_storage()
            memory[storage.data_ptr()] = storage.nbytes()
    return sum(memory.values())


def measure_optimizer(args: Arguments, model: MoTForCausalLM, ids: Tensor, choice: Choice) -> dict[str, Any]:
    """Time and memory of one optimizer of a model."""
    gradients = partial(compute_gradients, model, ids, args.bf16)
    gradients()
    parameters = take_parameters(model, choice.dtype)
    optimizer = make_optimizer(choice, parameters)
    works = {PASS: gradients, "step": optimizer.step}
    seconds = time_in_turn(works, args.num_rounds, args.device, num_warm_runs=0)
    timings = summarize_times(seconds, reference=PASS)
    ratio = timings["step"].relative_time
    held = {
        "parameters": count_bytes(parameters),
        "gradients": count_bytes(parameter.grad for parameter in parameters),
        "states": count_bytes(value for state in optimizer.state.values() for value in state.values()),
    }
    size = sum(parameter.numel() for parameter in parameters)
    peak = measure_peak_memory(optimizer.step, args.device)
    result = {
        "relative_time": ratio,
        "relative_time_quartiles": list(timings["step"].relative_time_quartiles),
        "share_of_a_step": {rows: ratio / (ratio + rows / args.num_rows) for rows in args.step_rows},
        "bytes_per_parameter": {name: num_bytes / size for name, num_bytes in {**held, "peak": peak}.items()},
        "calculated_bytes_per_device": {n: shard(held, n) for n in args.num_devices},
    }
    if args.device.startswith("cuda"):  # of no use from another CPU
        result["seconds"] = {name: timing.seconds for name, timing in timings.items()}
    return result


def shard(held: dict[str, int], num_devices: int) -> dict[str, float]:
    """Bytes on each device if states, or states, gradients and parameters, are divided among them."""
    rest = held["parameters"] + held["gradients"]
    return {"zero_1": rest + held["states"] / num_devices, "fsdp": (rest + held["states"]) / num_devices}


def measure_model(args: Arguments, name: str) -> dict[str, Any]:
    """Measure all optimizers on one model."""
    set_seed(0)
    with torch.device(args.device):
        model = MoTForCausalLM(make_config(args, is_dense=name == "dense")).train()
    ids = torch.randint(args.vocab_size, (args.num_rows, args.num_columns), device=args.device)
    results, skipped = {}, {}
    for optimizer in args.optimizers:
        choice = CHOICES[optimizer]
        try:
            result = measure_optimizer(args, model, ids, choice)
        except ImportError as error:
            skipped[optimizer] = str(error)
            print(f"{name}, {optimizer}: skipped. {error}")
            continue
        names = {"optim": choice.optim, "optim_args": choice.optim_args, "dtype": str(choice.dtype).split(".")[1]}
        results[optimizer] = {**names, **result}
        gc.collect()  # the states of all would not fit in memory
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"num_parameters": num_parameters, "optimizers": results, "skipped": skipped}


def tabulate(args: Arguments, name: str, model: dict[str, Any]) -> str:
    """Tables in Markdown about one model."""
    results = model["optimizers"]
    shares = [f"share at {rows} rows" for rows in args.step_rows]
    columns = ["time of a step", "quartiles", *shares, *HELD, "sum", "peak of a step"]
    devices = [f"{label}, {n} devices" for n in args.num_devices for label in ("ZeRO-1", "FSDP or ZeRO-3")]
    lines = [f"## {name}: {model['num_parameters'] / 1e6:.1f} M parameters", ""]
    lines += ["Time relative to forward and backward of a micro-batch; memory in bytes per parameter.", ""]
    lines += [f"| optimizer | `--optim` | {' | '.join(columns)} |", "|---|---|" + "---:|" * len(columns)]
    for optimizer, result in results.items():
        lines.append(f"| {optimizer} | {name_optim(result)} | {' | '.join(make_cells(result))} |")
    lines += ["", "Calculated, not measured: MB of parameters, gradients and states on each device.", ""]
    lines += [f"| optimizer | {' | '.join(devices)} |", "|---|" + "---:|" * len(devices)]
    for optimizer, result in results.items():
        cells = [f"{b / 1e6:,.0f}" for n in result["calculated_bytes_per_device"].values() for b in n.values()]
        lines.append(f"| {optimizer} | {' | '.join(cells)} |")
    lines += [f"\nSkipped: {optimizer}. {reason}" for optimizer, reason in model["skipped"].items()]
    return "\n".join(lines) + "\n"


def name_optim(result: dict[str, Any]) -> str:
    """The `Trainer`'s arguments for an optimizer."""
    extra = f" `--optim_args {result['optim_args']}`" if result["optim_args"] else ""
    return f"`{result['optim']}`{extra}"


def make_cells(result: dict[str, Any]) -> list[str]:
    """An optimizer's cells of the table."""
    sizes = result["bytes_per_parameter"]
    cells = [f"{result['relative_time']:.3f}"]
    cells.append(" to ".join(f"{ratio:.3f}" for ratio in result["relative_time_quartiles"]))
    cells += [f"{share:.2%}" for share in result["share_of_a_step"].values()]
    cells += [f"{sizes[part]:.2f}" for part in HELD]
    return [*cells, f"{sum(sizes[part] for part in HELD):.2f}", f"{sizes['peak']:.2f}"]


def draw(args: Arguments, models: dict[str, Any]) -> Figure:
    """The optimizer's share of a step over its tokens, and the memory behind a parameter."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_shares(left, models, [rows * args.num_columns for rows in args.step_rows])
    draw_memory(right, models["MoT"]["optimizers"])
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return figure


def draw_shares(axes: Axes, models: dict[str, Any], num_tokens: list[int]) -> None:
    """Draw lines for the MoT model, dashed ones of the same colours for the dense model."""
    for place, (name, result) in enumerate(models["MoT"]["optimizers"].items()):
        style = {"color": f"C{place}", "marker": "o", "markersize": 3}
        axes.plot(num_tokens, result["share_of_a_step"].values(), label=name, **style)
        dense = models["dense"]["optimizers"][name]
        axes.plot(num_tokens, dense["share_of_a_step"].values(), linestyle="--", **style)
    axes.set(xscale="log", yscale="log", xlabel="tokens of a step", ylabel="optimizer's share of a step")
    axes.set_title("MoT, and the dense model (dashed)", fontsize=10)
    axes.set_xticks(num_tokens, [f"{tokens:,}" for tokens in num_tokens])
    axes.xaxis.minorticks_off()
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    axes.grid(alpha=0.3)


def draw_memory(axes: Axes, results: dict[str, Any]) -> None:
    """Draw a bar for each optimizer: what it holds, and what a step takes beyond that."""
    left = [0.0] * len(results)
    for part, shade in zip((*HELD, "peak"), ("0.2", "0.45", "0.7", "0.9"), strict=True):
        widths = [result["bytes_per_parameter"][part] for result in results.values()]
        axes.barh(list(results), widths, left=left, color=shade, label="peak of a step" if part == "peak" else part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="bytes per parameter of the MoT model")
    axes.legend(frameon=False, fontsize=8)


def main(args: Arguments) -> None:
    """Measure both models, and write the results after each."""
    machine = describe_machine(args.device)
    record: dict[str, Any] = {"arguments": describe_arguments(args), "machine": machine, "models": {}}
    tables = []
    for name in ("MoT", "dense"):
        record["models"][name] = measure_model(args, name)
        gc.collect()  # a model refers to itself
        tables.append(tabulate(args, name, record["models"][name]))
        print(tables[-1])
        figure = draw(args, record["models"]) if len(tables) == 2 else None  # it compares the two
        write_results(args.output_dir, "optimizer", record, "\n".join(tables), figure)


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
