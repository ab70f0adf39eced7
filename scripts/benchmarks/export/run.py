r"""Compare exported models with the originals: logits, loss, text, size and time; also in llama.cpp.

Writes export.json. The stored results, from runs of benchmarks/transition and a run with MoT layers only, as llama.cpp
needs:

    python scripts/train_clm.py small_clm --output_dir runs/sparse_256 --num_experts 256 \
        --mlp_layer_types sparse sparse sparse sparse --transition_share 0.8 --max_steps 400
    python -m scripts.benchmarks.export.run --output_dir scripts/benchmarks/export/results \
        --models runs/tuned_256 runs/tuned runs/sparse_256 \
        --llama_cpp .venv/llama_cpp_python-*/vendor/llama.cpp
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PreTrainedModel

from mot_hf import MoTForCausalLM
from mot_hf.conversion.export import export_qwen3_moe, find_limits
from scripts.benchmarks.measuring import describe_machine, summarize_times, time_in_turn
from scripts.benchmarks.results import describe_arguments, write_results
from scripts.benchmarks.rows import describe_corpus, load_rows

Logits = Callable[[Tensor], Tensor]  # [B, T] to [B, T, V]


@dataclass
class Arguments:
    """Which models, on which text, and where to."""

    models: list[str] = field(metadata={"help": "folders of models that were tuned in mode moe"})
    output_dir: str = field(default="runs/export", metadata={"help": "folder for the results"})
    source: str | None = field(default=None, metadata={"help": "text; by default Python's standard library"})
    block_length: int = field(default=64, metadata={"help": "tokens T of a row"})
    prompt_length: int = field(default=8, metadata={"help": "tokens of a row that a text is generated from"})
    num_rows: int = field(default=32, metadata={"help": "validation rows B"})
    num_rounds: int = field(default=5, metadata={"help": "rounds of exports, after one that is not counted"})
    llama_cpp: str | None = field(default=None, metadata={"help": "folder of llama.cpp's source, to compare with it"})

    def __post_init__(self) -> None:
        """Refuse what cannot be measured, before measuring anything."""
        if self.num_rounds < 2:
            raise ValueError(f"`num_rounds` must be at least 2 for quartiles, got {self.num_rounds}.")


def size_of(folder: Path, pattern: str) -> int:
    """Bytes of the files that a pattern names."""
    return sum(path.stat().st_size for path in folder.glob(pattern))


def time_export(args: Arguments, model_dir: str, folder: Path) -> float:
    """Median time of an export, relative to loading the model and saving it as it is."""

    def save() -> None:
        MoTForCausalLM.from_pretrained(model_dir).save_pretrained(folder / "saved")

    def export() -> None:
        export_qwen3_moe(model_dir, folder / "exported", force=True)

    seconds = time_in_turn({"save": save, "export": export}, args.num_rounds, "cpu", num_warm_runs=0)
    return round(summarize_times(seconds, "save")["export"].relative_time, 2)


def continue_greedily(logits: Logits, prompts: Tensor, length: int) -> Tensor:
    """Append the likeliest tokens to prompts `[B, T]` until they have this length."""
    while prompts.shape[1] < length:
        prompts = torch.cat((prompts, logits(prompts)[:, -1:].argmax(dim=-1)), dim=1)
    return prompts


def compare_logits(args: Arguments, rows: Tensor, expected: Logits, actual: Logits) -> dict[str, float | int]:
    """How much two models differ on the same rows."""
    wanted, found = expected(rows), actual(rows)
    losses = [
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).item()
        for logits in (wanted, found)
    ]
    prompts = rows[:, : args.prompt_length]
    texts = [continue_greedily(logits, prompts, args.block_length) for logits in (expected, actual)]
    return {
        "largest_difference": (wanted - found).abs().max().item(),
        "deviation_of_logits": wanted.std().item(),
        "loss": losses[0],
        "difference_of_loss": losses[1] - losses[0],
        "same_texts": int((texts[0] == texts[1]).all(dim=1).sum()),
        "texts": len(rows),
    }


def logits_of(model: PreTrainedModel, **arguments: str) -> Logits:
    """The logits of a transformers model."""
    return lambda ids: model(ids, **arguments).logits


def compare_with_llama_cpp(args: Arguments, folder: Path, rows: Tensor, expected: Logits) -> dict[str, Any]:
    """Convert an exported model in float32, and compare the logits of llama.cpp."""
    llama_cpp = import_module("llama_cpp")  # which `make llama-cpp` installs
    output = folder / "model.gguf"
    command = [sys.executable, str(Path(__file__).parents[2] / "convert_gguf.py"), "--llama_cpp", args.llama_cpp]
    command += ["--model_dir", str(folder / "exported"), "--output", str(output), "--outtype", "f32"]
    subprocess.run(command, check=True, capture_output=True)
    f32 = llama_cpp.GGML_TYPE_F32
    settings = {"n_ctx": 256, "logits_all": True, "type_k": f32, "type_v": f32, "verbose": False}
    llama = llama_cpp.Llama(str(output), **settings)

    def logits(ids: Tensor) -> Tensor:
        found = []
        for row in ids.tolist():
            llama.reset()
            llama.eval(row)
            found.append(torch.from_numpy(llama.scores[: len(row)].copy()))
        return torch.stack(found)

    compared = compare_logits(args, rows, expected, logits)
    llama.close()
    return compared | {"bytes": output.stat().st_size, "llama_cpp_python": llama_cpp.__version__}


@torch.no_grad()
def compare(args: Arguments, model_dir: str, folder: Path) -> dict[str, Any]:
    """Export one model and compare."""
    config = export_qwen3_moe(model_dir, folder / "exported")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    validation = load_rows(tokenizer, args.source, block_length=args.block_length)["validation"]
    rows = torch.tensor(validation.select(range(args.num_rows))["input_ids"])  # [B, T]
    expected = logits_of(MoTForCausalLM.from_pretrained(model_dir), mixing="moe")
    actual = logits_of(AutoModelForCausalLM.from_pretrained(folder / "exported"))
    limits = find_limits(config)
    result = {
        "model": Path(model_dir).name,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "bytes": size_of(Path(model_dir), "*.safetensors"),
        "exported_bytes": size_of(folder / "exported", "*.safetensors"),
        "export_time": time_export(args, model_dir, folder),
        "transformers": compare_logits(args, rows, expected, actual),
        "llama_cpp_limits": limits,
    }
    if args.llama_cpp and not limits:
        result["llama_cpp"] = compare_with_llama_cpp(args, folder, rows, expected)
    return result


def main(args: Arguments) -> None:
    """Compare all models and write the numbers."""
    results = []
    for model_dir in args.models:
        with TemporaryDirectory() as folder:
            results.append(compare(args, model_dir, Path(folder)))
        print(json.dumps(results[-1], indent=2))
    record = {
        "results": results,
        "arguments": describe_arguments(args),
        "corpus": describe_corpus(args.source),
        "machine": describe_machine("cpu"),
    }
    write_results(args.output_dir, "export", record)


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
