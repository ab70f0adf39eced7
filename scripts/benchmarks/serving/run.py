"""Measure what MoT costs in vLLM: tokens per second against Qwen3-MoE of the same weights, and whether answers agree.

One model with random weights and statistics of random tokens is served in modes per_sequence and moe, with its code
through vLLM's backend for transformers. Its export is served as vLLM's own Qwen3-MoE, and through the same backend.
Each has a process of its own, and they take turns: a round gives every one the same requests once. A figure is the
median over rounds of the ratio to vLLM's own Qwen3-MoE in the same round. Tokens and log-probabilities are compared
with `generate` in transformers. Close other programs. Writes `serving.json` and `serving.md`; needs `make vllm`. The
stored results:

    python -m scripts.benchmarks.serving.run --output_dir scripts/benchmarks/serving/results
"""

import subprocess
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, HfArgumentParser, set_seed

from mot_hf import MoTConfig, MoTForCausalLM
from mot_hf.conversion.export import export_qwen3_moe
from scripts.benchmarks.generation.run import gather_statistics
from scripts.benchmarks.measuring import describe_machine, summarize_times
from scripts.benchmarks.results import describe_arguments, write_results
from scripts.benchmarks.serving.engines import Answer, EngineProcess

REFERENCE = "Qwen3-MoE, vLLM's own"
# Folder, and arguments of the engine.
SERVED: dict[str, tuple[str, dict[str, Any]]] = {
    REFERENCE: ("exported", {}),
    "Qwen3-MoE, as a model of transformers": ("exported", {"model_impl": "transformers"}),
    "MoT, `moe`": ("mot", {"hf_overrides": {"inference_mixing": "moe"}}),
    "MoT, `per_sequence`": ("mot", {}),
}


@dataclass
class Arguments:
    """Sizes and repetitions."""

    output_dir: str = field(default="runs/serving", metadata={"help": "folder for the results"})
    python: str = field(default=".venv-vllm/bin/python", metadata={"help": "the Python with vLLM"})
    hidden_size: int = field(default=512, metadata={"help": "model width D"})
    intermediate_size: int = field(default=1408, metadata={"help": "width of the dense feed-forward layers"})
    num_hidden_layers: int = field(default=4, metadata={"help": "blocks, the later half of them MoT"})
    group_size: int = field(default=32, metadata={"help": "rows G of a group in training"})
    num_experts: int = field(default=256, metadata={"help": "experts E; K = E / G of them are run for a token"})
    vocab_size: int = field(default=8192, metadata={"help": "size of the vocabulary"})
    num_requests: int = field(default=8, metadata={"help": "requests that come together"})
    prompt_length: int = field(default=128, metadata={"help": "tokens of a prompt"})
    num_new_tokens: int = field(default=32, metadata={"help": "tokens of an answer"})
    num_rounds: int = field(default=5, metadata={"help": "rounds, after one that is not counted"})
    dtype: str = field(default="float32", metadata={"help": "dtype of weights and cache"})

    def __post_init__(self) -> None:
        """Refuse what cannot be measured, before measuring anything."""
        if self.num_rounds < 2:
            raise ValueError(f"`num_rounds` must be at least 2 for quartiles, got {self.num_rounds}.")


def save_models(args: Arguments, folder: Path) -> None:
    """Save the model that is served, and its export."""
    model = MoTForCausalLM(
        MoTConfig(
            vocab_size=args.vocab_size,
            hidden_size=args.hidden_size,
            intermediate_size=args.intermediate_size,
            num_hidden_layers=args.num_hidden_layers,
            num_attention_heads=max(1, args.hidden_size // 64),
            head_dim=64,
            max_position_embeddings=2 * (args.prompt_length + args.num_new_tokens),
            group_size=args.group_size,
            num_experts=args.num_experts,
            norm_topk_prob=True,
        )
    )
    gather_statistics(model)
    model.save_pretrained(folder / "mot")
    export_qwen3_moe(folder / "mot", folder / "exported", allow_untuned=True)


def start_engines(args: Arguments, folder: Path, stack: ExitStack) -> dict[str, EngineProcess]:
    """Start all engines, each in a process of its own."""
    engines = {}
    for number, (name, (model_dir, settings)) in enumerate(SERVED.items()):
        engine = stack.enter_context(EngineProcess(args.python, folder / f"engine_{number}"))
        engine.start(
            folder / model_dir,
            trust_remote_code=model_dir == "mot",
            dtype=args.dtype,
            max_model_len=2 * (args.prompt_length + args.num_new_tokens),
            max_num_seqs=args.num_requests,
            enable_prefix_caching=False,  # or later rounds would find their prompts there
            skip_tokenizer_init=True,
            seed=0,
            **settings,
        )
        engines[name] = engine
    return engines


def make_prompts(args: Arguments) -> list[list[int]]:
    """Random prompts, all of the same length."""
    return torch.randint(args.vocab_size, (args.num_requests, args.prompt_length)).tolist()


def measure_speed(args: Arguments, engines: dict[str, EngineProcess]) -> dict[str, dict[str, Any]]:
    """Time all engines in turn, round after round: prompts with one new token, and whole answers."""
    lengths = {"prefill": 1, "answers": args.num_new_tokens}
    seconds: dict[str, dict[str, list[float]]] = {phase: {name: [] for name in engines} for phase in lengths}
    for turn in range(args.num_rounds + 1):
        prompts = make_prompts(args)
        for phase, num_tokens in lengths.items():
            for name, engine in engines.items():
                _, elapsed = engine.generate(prompts, num_tokens)
                if turn > 0:
                    seconds[phase][name].append(elapsed)
    speeds: dict[str, dict[str, Any]] = {name: {} for name in engines}
    for phase, times in seconds.items():
        for name, timing in summarize_times(times, REFERENCE).items():
            lower, upper = timing.relative_time_quartiles
            speeds[name][f"{phase}_speed"] = {
                "relative_speed": 1 / timing.relative_time,
                "quartiles": [1 / upper, 1 / lower],
            }
    return speeds


@torch.no_grad()
def generate(folder: Path, mode: str | None, prompts: list[list[int]], num_tokens: int) -> list[Answer]:
    """What transformers makes of each prompt alone."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    options = {"mixing": mode} if mode else {}
    answers = []
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=num_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
        tokens = output.sequences[0, len(prompt) :]
        logprobs = torch.cat(output.logits).log_softmax(dim=-1).gather(1, tokens[:, None]).squeeze(1)
        answers.append(Answer(tokens.tolist(), logprobs.tolist(), [], 0))
    return answers


def compare_answers(args: Arguments, engines: dict[str, EngineProcess], folder: Path) -> dict[str, dict[str, Any]]:
    """Compare every engine's answers with those of transformers."""
    prompts = make_prompts(args)
    compared = {}
    for name, engine in engines.items():
        model_dir = SERVED[name][0]
        mode = None if model_dir == "exported" else "moe" if "moe" in name else "per_sequence"
        expected = generate(folder / model_dir, mode, prompts, args.num_new_tokens)
        answers, _ = engine.generate(prompts, args.num_new_tokens)
        pairs = list(zip(answers, expected, strict=True))
        differences = [
            abs(one - other)
            for answer, wanted in pairs
            if answer.tokens == wanted.tokens
            for one, other in zip(answer.logprobs, wanted.logprobs, strict=True)
        ]
        compared[name] = {
            "same_answers": sum(answer.tokens == wanted.tokens for answer, wanted in pairs),
            "answers": len(pairs),
            "largest_difference": max(differences, default=None),
        }
    return compared


def make_table(results: dict[str, dict[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = [
        "| served | same tokens as `generate` | log-probabilities differ by at most | prompts | answers |",
        "|---|---|---|---|---|",
    ]
    for name, result in results.items():
        speeds = [f"{result[phase]['relative_speed']:.2f}" for phase in ("prefill_speed", "answers_speed")]
        difference = result["largest_difference"]
        cells = [name, f"{result['same_answers']} of {result['answers']}"]
        cells += ["" if difference is None else f"{difference:.1e}", *speeds]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def find_version(python: str) -> str:
    """The version of vLLM under a Python, empty if there is none."""
    code = "from importlib.metadata import *; print(version(packages_distributions()['vllm'][0]))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()


def main(args: Arguments) -> None:
    """Serve all models, then write and print the results."""
    if not Path(args.python).is_file():
        raise ValueError(f"`python={args.python!r}` is no Python with vLLM: run `make vllm` first.")
    set_seed(0)
    with TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        save_models(args, folder)
        engines = start_engines(args, folder, stack)
        speeds, compared = measure_speed(args, engines), compare_answers(args, engines, folder)
    results = {name: compared[name] | speeds[name] for name in engines}
    machine = describe_machine("cpu")
    machine["versions"]["vllm"] = find_version(args.python)
    record = {"results": results, "arguments": describe_arguments(args), "machine": machine}
    write_results(args.output_dir, "serving", record, make_table(results))
    print(make_table(results))


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
