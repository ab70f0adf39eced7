r"""Measure the speed of generation: prefill and decode of MoT against Qwen3-MoE and dense Qwen3, side by side.

All models have the same attention, embeddings and number of FLOPs per token. Qwen3-MoE has the weights of the MoT
model, and the dense model's feed-forward layers are as wide as the K experts that a token uses. A round times every
model once, in turn. A figure is the median over rounds, of times and of ratios to Qwen3-MoE in the same round. Close
other programs. Writes `generate.json` to the output folder, with absolute speeds only on a GPU. The stored results:

    python -m scripts.benchmarks.generation.run --num_rounds 5 \
        --output_dir scripts/benchmarks/generation/results/256
    python -m scripts.benchmarks.generation.run --num_rounds 5 --num_experts 32 \
        --output_dir scripts/benchmarks/generation/results/32

On a GPU:

    python -m scripts.benchmarks.generation.run --device cuda --dtype bfloat16 --batch_sizes 1 8 32 256
"""

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import (
    DynamicCache,
    HfArgumentParser,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    set_seed,
)

from mot_hf import MoTConfig, MoTForCausalLM
from mot_hf.modeling.configuration_mot import find_layers
from scripts.benchmarks.measuring import describe_machine, read_clock, summarize_times
from scripts.benchmarks.results import describe_arguments, write_results

REFERENCE = "Qwen3-MoE"
PHASES = ("prefill", "decode")


@dataclass
class Arguments:
    """Sizes and repetitions."""

    output_dir: str = field(default="runs/generation", metadata={"help": "folder for the results"})
    hidden_size: int = field(default=512, metadata={"help": "model width D"})
    intermediate_size: int = field(default=1408, metadata={"help": "width of the dense feed-forward layers"})
    num_hidden_layers: int = field(default=8, metadata={"help": "blocks, the later half of them MoT"})
    group_size: int = field(default=32, metadata={"help": "rows G of a group in training"})
    num_experts: int = field(default=256, metadata={"help": "experts E; K = E / G of them are run for a token"})
    vocab_size: int = field(default=8192, metadata={"help": "size of the vocabulary"})
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8, 32], metadata={"help": "numbers of rows B"})
    prompt_length: int = field(default=128, metadata={"help": "tokens of a prompt"})
    num_new_tokens: int = field(default=16, metadata={"help": "decoding steps that are timed together"})
    num_rounds: int = field(default=7, metadata={"help": "rounds, after one that is not counted"})
    device: str = field(default="cpu", metadata={"help": "device"})
    dtype: str = field(default="float32", metadata={"help": "dtype of the parameters"})

    def __post_init__(self) -> None:
        """Refuse what cannot be measured, before measuring anything."""
        if self.num_rounds < 2:
            raise ValueError(f"`num_rounds` must be at least 2 for quartiles, got {self.num_rounds}.")


def make_models(args: Arguments) -> dict[str, tuple[PreTrainedModel, dict[str, Any]]]:
    """Make the models, each with the arguments of its calls."""
    shared = {
        "vocab_size": args.vocab_size,
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.num_hidden_layers,
        "num_attention_heads": max(1, args.hidden_size // 64),
        "num_key_value_heads": max(1, args.hidden_size // 64),
        "head_dim": 64,
        "max_position_embeddings": args.prompt_length + args.num_new_tokens,
    }
    mot = MoTForCausalLM(
        MoTConfig(
            **shared,
            intermediate_size=args.intermediate_size,
            group_size=args.group_size,
            num_experts=args.num_experts,
            norm_topk_prob=True,  # also where K is 1, as when the stored speeds were measured
        )
    )
    gather_statistics(mot)
    config = mot.config
    qwen3_moe = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **shared,
            intermediate_size=args.intermediate_size,
            num_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            moe_intermediate_size=config.moe_intermediate_size,
            norm_topk_prob=config.norm_topk_prob,
            mlp_only_layers=find_layers(config, "dense"),
        )
    )
    missing, unexpected = qwen3_moe.load_state_dict(mot.state_dict(), strict=False)
    if missing or any("companions" not in name for name in unexpected):
        raise RuntimeError(f"Qwen3-MoE's weights differ from MoT's: missing {missing}, unexpected {unexpected}.")
    num_neurons = cast(int, config.num_experts_per_tok) * cast(int, config.moe_intermediate_size)
    dense = Qwen3ForCausalLM(Qwen3Config(**shared, intermediate_size=num_neurons))
    models = {
        REFERENCE: (qwen3_moe, {}),
        "MoT, per_sequence": (mot, {"mixing": "per_sequence"}),
        "MoT, moe": (mot, {"mixing": "moe"}),
        "Qwen3, dense": (dense, {}),
    }
    for model, _ in models.values():
        model.eval().to(args.device, getattr(torch, args.dtype))
    return models


@torch.no_grad()
def gather_statistics(model: MoTForCausalLM) -> None:
    """Give a new model statistics, as training would, from one group of random tokens."""
    model.train()(torch.randint(model.config.vocab_size, (model.config.group_size, 16)))


@torch.inference_mode()
def time_generation(
    model: PreTrainedModel, ids: Tensor, num_new_tokens: int, call: dict[str, Any], device: str
) -> dict[str, float]:
    """Seconds for the prefill of a batch of prompts `[B, T]`, and for some decoding steps after it."""
    cache = DynamicCache(config=model.config)
    start = read_clock(device)
    logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **call).logits
    prefilled = read_clock(device)
    with model._optimize_model_for_decode():  # as `generate()` does: other kernels for experts with few tokens
        for _ in range(num_new_tokens):
            ids = logits[:, -1:].argmax(-1)
            logits = model(ids, past_key_values=cache, use_cache=True, **call).logits
    return {"prefill": prefilled - start, "decode": read_clock(device) - prefilled}


def measure(args: Arguments, models: dict[str, tuple[PreTrainedModel, dict[str, Any]]], num_rows: int) -> list[dict]:
    """Time all models in turn, round after round, at one batch size."""
    rounds = []
    for _ in range(args.num_rounds + 1):
        ids = torch.randint(args.vocab_size, (num_rows, args.prompt_length), device=args.device)
        rounds.append(
            {
                name: time_generation(model, ids, args.num_new_tokens, call, args.device)
                for name, (model, call) in models.items()
            }
        )
    num_tokens = {"prefill": num_rows * args.prompt_length, "decode": num_rows * args.num_new_tokens}
    results = []
    for phase in PHASES:
        seconds = {name: [of_round[name][phase] for of_round in rounds[1:]] for name in models}
        for name, timing in summarize_times(seconds, REFERENCE).items():
            lower, upper = timing.relative_time_quartiles
            results.append(
                {
                    "batch_size": num_rows,
                    "phase": phase,
                    "model": name,
                    "tokens_per_second": num_tokens[phase] / timing.seconds,
                    "relative_speed": 1 / timing.relative_time,
                    "relative_speed_quartiles": [1 / upper, 1 / lower],
                }
            )
    return results


def print_table(results: list[dict[str, Any]], console: Console) -> None:
    """Print tokens per second, and the speed relative to Qwen3-MoE with its quartiles."""
    table = Table(title=f"speed of generation; relative to {REFERENCE} in the same round")
    for column in ("batch", "phase", "model", "tokens/s", "relative", "quartiles"):
        table.add_column(column, justify="left" if column in ("phase", "model") else "right")
    for result in results:
        table.add_row(
            str(result["batch_size"]),
            result["phase"],
            result["model"],
            f"{result['tokens_per_second']:,.0f}",
            f"{result['relative_speed']:.2f}",
            " to ".join(f"{ratio:.2f}" for ratio in result["relative_speed_quartiles"]),
            end_section=result["model"] == "Qwen3, dense",
        )
    console.print(table)


def main(args: Arguments) -> None:
    """Time all models at every batch size, then write and print the results."""
    set_seed(0)
    models = make_models(args)
    results = [result for num_rows in args.batch_sizes for result in measure(args, models, num_rows)]
    record = {
        "results": results,
        "arguments": describe_arguments(args),
        "machine": describe_machine(args.device),
    }
    console = Console()
    print_table(results, console)
    if not args.device.startswith("cuda"):
        for result in results:
            del result["tokens_per_second"]  # of no use on another machine
    write_results(args.output_dir, "generate", record)
    console.print(f"results   {args.output_dir}")


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
