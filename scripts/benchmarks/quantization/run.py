r"""Measure what quantization saves and costs: size and validation loss of a model that is stored in several ways.

Most weights of a MoT model belong to its experts, which are 3-D parameters: methods that quantize only linear layers
leave them as they are. So int8 is measured for linear layers, and for linear layers and experts. Router, companions,
embeddings and head are never quantized. All on the same validation rows in mode per_sequence. Writes `quantization.md`
and `quantization.json` to the output folder. Needs torchao and bitsandbytes. The stored results:

    python scripts/train_clm.py small_clm --max_steps 1000 --output_dir runs/clm32
    python scripts/train_clm.py small_clm --max_steps 1000 --output_dir runs/clm256 --num_experts 256
    python -m scripts.benchmarks.quantization.run --models runs/clm32 runs/clm256 \
        --output_dir scripts/benchmarks/quantization/results
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, HfArgumentParser, TorchAoConfig

from mot_hf import MoTPreTrainedModel
from mot_hf.modeling.modeling_mot import MoTExperts
from scripts.benchmarks.comparison import validation_loss
from scripts.benchmarks.measuring import describe_machine
from scripts.benchmarks.results import describe_arguments, write_results
from scripts.benchmarks.rows import describe_corpus, load_rows

# The experts' parameters have names like those of linear layers: q_proj, down_proj, experts.gate_up_proj.
ALL_PROJECTIONS = FqnToConfig({"re:.*_proj": Int8WeightOnlyConfig()})
# torchao's tensors support the operations of the loop over experts, but not grouped_mm.
IN_A_LOOP = {"experts_implementation": "eager"}

# Arguments of from_pretrained. All others are compared with the first.
WAYS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "int8 linear layers (torchao)": {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())},
    "int8 linear layers (bitsandbytes)": {
        # Above a threshold columns are not quantized, and which ones depends on the whole batch.
        "quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    },
    "4-bit linear layers (bitsandbytes)": {
        "quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    },
    "int8 linear layers and experts (torchao)": {"quantization_config": TorchAoConfig(ALL_PROJECTIONS), **IN_A_LOOP},
    "... and the rest bfloat16": {
        "quantization_config": TorchAoConfig(ALL_PROJECTIONS),
        "dtype": torch.bfloat16,
        **IN_A_LOOP,
    },
}


@dataclass
class Arguments:
    """What to measure, and on what."""

    models: list[str] = field(metadata={"help": "folders of causal models with their tokenizers"})
    output_dir: str = field(default="runs/quantization", metadata={"help": "folder for the results"})
    source: str | None = field(default=None, metadata={"help": "text; by default Python's standard library"})
    block_length: int = field(default=64, metadata={"help": "tokens in a row, as in training"})
    max_rows: int = field(default=1024, metadata={"help": "validation rows"})
    batch_size: int = field(default=64, metadata={"help": "rows in a batch"})


def bytes_of(tensor: Tensor) -> int:
    """Bytes of a tensor; a quantized one consists of integers, scales and zero points."""
    if flatten := getattr(tensor, "__tensor_flatten__", None):
        return sum(bytes_of(getattr(tensor, name)) for name in flatten()[0])
    return tensor.numel() * tensor.element_size()


def count_shares(model: MoTPreTrainedModel) -> dict[str, float]:
    """Shares of the parameters in linear layers, without the head, and in experts."""
    head = model.get_output_embeddings()
    total = sum(parameter.numel() for parameter in model.parameters())
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    experts = [module for module in model.modules() if isinstance(module, MoTExperts)]
    return {
        name: sum(parameter.numel() for module in modules for parameter in module.parameters()) / total
        for name, modules in (("linear layers", linear), ("experts", experts))
    }


def measure_way(model_dir: str, arguments: dict[str, Any], rows: Dataset, batch_size: int) -> dict[str, float]:
    """Load a model in one way, and measure its bytes and its loss in nats per predicted token."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, **arguments).set_mixing(inference_mixing="per_sequence")
    num_bytes = sum(map(bytes_of, model.state_dict().values()))
    return {"bytes": num_bytes, "loss": validation_loss(model, rows, batch_size)}


def measure(model_dir: str, args: Arguments) -> dict[str, Any]:
    """Measure a model stored in every way."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    rows = load_rows(tokenizer, args.source, block_length=args.block_length, group_size=model.config.group_size)[
        "validation"
    ]
    rows = rows.select(range(min(args.max_rows, len(rows)))).with_format("torch")
    return {
        "model": Path(model_dir).name,
        "num_experts": model.config.num_experts,
        "shares": count_shares(model),
        "ways": {name: measure_way(model_dir, arguments, rows, args.batch_size) for name, arguments in WAYS.items()},
    }


def make_table(results: list[dict[str, Any]]) -> str:
    """Markdown: one row for each model and way of storing it."""
    columns = ["model", "weights", "bytes", "share of float32", "loss", "difference"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for result in results:
        reference = result["ways"]["float32"]
        for name, way in result["ways"].items():
            cells = [f"E = {result['num_experts']}", name, f"{way['bytes']:,}"]
            cells += [f"{way['bytes'] / reference['bytes']:.1%}", f"{way['loss']:.4f}"]
            cells.append(f"{way['loss'] - reference['loss']:+.4f}")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(args: Arguments) -> None:
    """Measure every model, then write the numbers and the table."""
    if min(args.max_rows, args.batch_size) < 1:
        raise ValueError(
            f"`max_rows={args.max_rows}` and `batch_size={args.batch_size}` must be at least 1: they count rows."
        )
    # It warns in every layer and batch that it computes in float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    results = [measure(model_dir, args) for model_dir in args.models]
    record = {
        "results": results,
        "arguments": describe_arguments(args),
        "corpus": describe_corpus(args.source),
        "machine": describe_machine("cpu", "torchao", "bitsandbytes"),
    }
    write_results(args.output_dir, "quantization", record, make_table(results))
    print(make_table(results))


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
