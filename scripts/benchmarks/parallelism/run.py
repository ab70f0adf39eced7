r"""Count what processes send that a MoT model is spread over, and calculate what that takes on many GPUs.

Counted are collective operations, their bytes and the looks of the host at a tensor, in one training pass of a small
model under bfloat16 autocast, by two processes of a CPU that gloo joins. What they send does not depend on the device.

Calculated is the time of one MoT layer, forward and backward, from its FLOPs and bytes and from what a GPU and its
links are said to do: matrix products against FSDP, which gathers all weights for every micro-batch, and against
experts that stay where they are, in one node or in four, while rows travel. Weights and rows are in bfloat16,
gradients in float32, and experts have three weights a neuron. Experts that several groups of GPUs have are gathered
among these. Nothing of it was measured on GPUs. Writes parallelism.json and parallelism.md into --output_dir. The
stored results:

    python -m scripts.benchmarks.parallelism.run --output_dir scripts/benchmarks/parallelism/results/cpu
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from transformers import HfArgumentParser, set_seed
from transformers.distributed import DistributedConfig

import mot_hf.training.exchange  # noqa: F401  # registers an exchange
from mot_hf import MoTConfig, MoTForCausalLM
from mot_hf.training.layout import Layout, count_sent_bytes
from scripts.benchmarks.measuring import describe_machine
from scripts.benchmarks.parallelism.joined import Traffic, fork_joined
from scripts.benchmarks.results import describe_arguments, write_results

NUM_PROCESSES = 2
KINDS = ("exchanges", "gathers", "scatters", "sums")
# What is counted: sizes of `DistributedConfig`, and how rows travel to experts.
LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp 2": {"fsdp_size": 2},
    "fsdp 2, ep 2": {"fsdp_size": 2, "ep_size": 2, "ep_implementation": "mot_all_to_all"},
    "fsdp 2, ep 2, transformers' exchange": {"fsdp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"},
    "tp 2": {"tp_size": 2},
    "tp 2, ep 2": {"tp_size": 2, "ep_size": 2, "ep_implementation": "mot_all_to_all"},
}
BYTES = 2  # of a value in bfloat16
TRIPS = 4  # of weights in bfloat16: gathered twice, and scattered once as gradients in float32
NUM_NODES = 4  # over which experts are spread, if it is not one


@dataclass
class Arguments:
    """Sizes of a layer, and GPUs."""

    output_dir: str = field(default="runs/parallelism", metadata={"help": "folder for the results"})
    hidden_size: int = field(default=2048, metadata={"help": "model width D"})
    intermediate_size: int = field(default=5632, metadata={"help": "width F of the dense layer of as many FLOPs"})
    group_size: int = field(default=32, metadata={"help": "rows G of a group"})
    num_experts: list[int] = field(default_factory=lambda: [32, 256], metadata={"help": "numbers of experts E"})
    num_tokens: int = field(default=8192, metadata={"help": "tokens of a GPU's micro-batch"})
    num_devices: list[int] = field(default_factory=lambda: [8, 64, 1024], metadata={"help": "numbers of GPUs"})
    devices_per_node: int = field(default=8, metadata={"help": "GPUs of a node"})
    tflops: float = field(default=400.0, metadata={"help": "1e12 FLOPs per second of a GPU's products"})
    gigabytes_in_node: float = field(default=300.0, metadata={"help": "GB/s that a GPU sends within a node"})
    gigabytes_between_nodes: float = field(default=40.0, metadata={"help": "GB/s that a GPU sends to other nodes"})

    def __post_init__(self) -> None:
        """Refuse what cannot be calculated."""
        for number in self.num_devices:
            if number % self.devices_per_node:
                raise ValueError(
                    f"`num_devices` has {number}, which is not a multiple of `devices_per_node` "
                    f"({self.devices_per_node})."
                )


def small_config(num_experts: int = 16) -> MoTConfig:
    """The model whose processes are counted: one dense block and one with experts."""
    return MoTConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        group_size=8,
        num_experts=num_experts,
    )


def count_passes(folder: Path) -> None:
    """Let a process count a pass in each layout; the first one writes what it counted."""
    counted = {name: count_pass(folder, options) for name, options in LAYOUTS.items()}
    if dist.get_rank() == 0:
        (folder / "counted.json").write_text(json.dumps(counted))


def count_pass(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Count the second of two passes with gradients: 16 rows of 32 tokens in all, as a `Trainer` does them in bf16."""
    config = DistributedConfig(**options, fsdp_mixed_precision=True)
    model: Any = MoTForCausalLM.from_pretrained(folder, distributed_config=config).train()
    num_rows = 16 if config.tp_size == 2 else 8
    ids = torch.randint(512, (num_rows, 32), generator=torch.Generator().manual_seed(0))
    traffic = Traffic()
    for _ in range(2):
        traffic = Traffic()
        with traffic, traffic.watching_looks():
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        model.zero_grad()
    sizes = Layout(NUM_PROCESSES, config.tp_size or 1, config.fsdp_size or 1, config.ep_size or 1)
    with torch.device("meta"):
        whole = MoTForCausalLM(small_config())
    return {
        "numbers": {kind: traffic.numbers[kind] for kind in KINDS},
        "bytes": {kind: traffic.bytes[kind] for kind in KINDS},
        "sent_bytes": traffic.sent_bytes(NUM_PROCESSES),
        "calculated_bytes": count_sent_bytes(whole, sizes, ids.numel(), 1, bf16=True, checkpointing=False),
        "looks": traffic.looks,
    }


def count_in_processes() -> dict[str, Any]:
    """What two processes send in each layout."""
    set_seed(0)
    with TemporaryDirectory() as folder:
        MoTForCausalLM(small_config()).save_pretrained(folder)
        fork_joined(NUM_PROCESSES, partial(count_passes, Path(folder)))
        return json.loads((Path(folder) / "counted.json").read_text())


def simulate(args: Arguments) -> Iterator[dict[str, Any]]:
    """Milliseconds of a layer for all numbers of GPUs and experts."""
    width, neurons, size = args.hidden_size, args.intermediate_size, args.group_size
    weights = 3 * width * neurons * size * BYTES
    for num_devices in args.num_devices:
        for num_experts in args.num_experts:
            # Experts as the dense layer, and four products of mixing and handing back; the backward pass takes twice.
            flops = 3 * args.num_tokens * (6 * width * neurons + 4 * num_experts * width)
            rows = 4 * BYTES * num_experts / size * width * args.num_tokens
            setups = {"node": args.devices_per_node, "nodes": NUM_NODES * args.devices_per_node}
            yield {
                "num_devices": num_devices,
                "num_experts": num_experts,
                "products": flops / (args.tflops * 1e9),
                "fsdp": TRIPS * time_gathering(args, weights, num_devices),
                **{
                    f"experts_in_{name}": {
                        "exchange": time_exchange(args, rows, group),
                        "gather": TRIPS * time_gathering_copies(args, weights / group, num_devices // group),
                    }
                    for name, group in setups.items()
                    if group <= num_devices
                },
            }


def time_gathering(args: Arguments, num_bytes: float, num_devices: int) -> float:
    """Milliseconds to gather bytes that all GPUs have parts of, in rings that use all links of a node."""
    rate = args.gigabytes_in_node
    if num_devices > args.devices_per_node:
        rate = min(rate, args.devices_per_node * args.gigabytes_between_nodes)
    return num_bytes * (num_devices - 1) / num_devices / (rate * 1e6)


def time_gathering_copies(args: Arguments, num_bytes: float, num_copies: int) -> float:
    """Milliseconds to gather bytes that GPUs with the same experts have parts of, each of them in another node."""
    return num_bytes * (num_copies - 1) / num_copies / (args.gigabytes_between_nodes * 1e6)


def time_exchange(args: Arguments, num_bytes: float, num_devices: int) -> float:
    """Milliseconds to send bytes to all of a group of GPUs in equal shares."""
    outside = max(0, num_devices - args.devices_per_node) / num_devices
    inside = (min(num_devices, args.devices_per_node) - 1) / num_devices
    links = (inside / args.gigabytes_in_node, outside / args.gigabytes_between_nodes)
    return num_bytes * max(links) / 1e6


def find_balance(args: Arguments, num_experts: int) -> dict[str, float]:
    """Tokens of a process at which experts that stay cost as many bytes as FSDP, and those whose products hide it."""
    gathered = 3 * TRIPS * args.hidden_size * args.intermediate_size * args.group_size * BYTES
    exchanged = 4 * BYTES * num_experts / args.group_size * args.hidden_size
    of_token = 3 * (6 * args.hidden_size * args.intermediate_size + 4 * num_experts * args.hidden_size)
    seconds = gathered / (args.gigabytes_in_node * 1e9)
    return {
        "bytes_gathered_in_a_micro_batch": gathered,
        "bytes_exchanged_by_a_token": exchanged,
        "tokens_of_equal_bytes": gathered / exchanged,
        "tokens_whose_products_take_as_long_as_gathering": seconds * args.tflops * 1e12 / of_token,
    }


def tabulate_counts(counted: dict[str, Any]) -> str:
    """A table of what was counted."""
    lines = [
        "| processes | all-to-alls | gathers | scatters | sums | KB sent | KB calculated | times the host waits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, pass_ in counted.items():
        numbers = " | ".join(str(pass_["numbers"][kind]) for kind in KINDS)
        sent, calculated = (pass_[key] / 1000 for key in ("sent_bytes", "calculated_bytes"))
        lines.append(f"| {name} | {numbers} | {sent:.0f} | {calculated:.0f} | {pass_['looks']} |")
    return "\n".join(lines)


def tabulate_times(rows: list[dict[str, Any]]) -> str:
    """A table of what was calculated, in milliseconds."""
    lines = [
        "| GPUs | E | ms of products | of FSDP | of experts in a node: exchange + gather | of experts in 4 nodes |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [str(row["num_devices"]), str(row["num_experts"]), f"{row['products']:.1f}", f"{row['fsdp']:.1f}"]
        for name in ("experts_in_node", "experts_in_nodes"):
            times = row.get(name)
            cells.append(f"{times['exchange']:.1f} + {times['gather']:.1f}" if times else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tabulate_balances(balances: dict[int, dict[str, float]]) -> str:
    """A table of tokens at which one takes as long as the other."""
    lines = [
        "| E | GB that FSDP moves for a micro-batch | KB that a token sends to experts | tokens of equal bytes | "
        "tokens whose products hide FSDP |",
        "|---|---|---|---|---|",
    ]
    for num_experts, balance in balances.items():
        gathered, exchanged, equal, hidden = balance.values()
        lines.append(f"| {num_experts} | {gathered / 1e9:.1f} | {exchanged / 1e3:.0f} | {equal:.0f} | {hidden:.0f} |")
    return "\n".join(lines)


def main(args: Arguments) -> None:
    """Count, calculate and write the results."""
    counted, times = count_in_processes(), list(simulate(args))
    balances = {num_experts: find_balance(args, num_experts) for num_experts in args.num_experts}
    table = "\n\n".join([tabulate_counts(counted), tabulate_times(times), tabulate_balances(balances)]) + "\n"
    record = {
        "arguments": describe_arguments(args),
        "machine": describe_machine("cpu"),
        "counted": counted,
        "calculated_milliseconds": times,
        "balances": balances,
    }
    write_results(args.output_dir, "parallelism", record, table)
    print(table)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
