"""Measure what quantization saves and costs: bytes held and validation loss of a model, stored in several ways.

Most weights of a MoT model are its experts', which are 3-D parameters: what quantizes linear layers alone leaves them
as they are. So int8 is measured for linear layers, and for linear layers and experts. Router, companions, embeddings
and head are never quantized. All on the same validation rows in mode per_sequence. Writes `quantization.md` and
`quantization.json` to the output folder. Needs torchao and bitsandbytes. The stored results:

    python scripts/train_clm.py scripts/recipes/small_clm.yaml --output_dir runs/clm32
    python scripts/train_clm.py scripts/recipes/small_clm.yaml --output_dir runs/clm256 --num_experts 256
    python -m scripts.benchmarks.quantization.run --models runs/clm32 runs/clm256 \
        --output_dir scripts/benchmarks/quantization/results

The stored results are of models that began with the paper's controllers: `--router_initializer_range 0.02`.
"""

import json
import logging
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, HfArgumentParser, TorchAoConfig

from mot_hf import MoTPreTrainedModel
from mot_hf.data.blocks import make_blocks
from mot_hf.data.corpus import load_corpus
from mot_hf.data.default_corpus import default_corpus_info
from mot_hf.modeling.modeling_mot import MoTExperts

# The experts' parameters bear names like those of linear layers: q_proj, down_proj, experts.gate_up_proj.
ALL_PROJECTIONS = FqnToConfig({"re:.*_proj": Int8WeightOnlyConfig()})
# torchao's tensors know the operations of the loop over experts, not those of grouped_mm.
IN_A_LOOP = {"experts_implementation": "eager"}

# What from_pretrained is given; the first is what the others are compared with.
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
    """Bytes that a tensor holds; those of a quantized one are its integers', scales' and zero points'."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(bytes_of(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def count_shares(model: MoTPreTrainedModel) -> dict[str, float]:
    """Shares of the parameters that are in linear layers, the head left out, and in experts."""
    head = model.get_output_embeddings()
    total = sum(parameter.numel() for parameter in model.parameters())
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    experts = [module for module in model.modules() if isinstance(module, MoTExperts)]
    return {
        name: sum(parameter.numel() for module in modules for parameter in module.parameters()) / total
        for name, modules in (("linear layers", linear), ("experts", experts))
    }


def load_rows(model_dir: str, args: Arguments, group_size: int) -> list[Tensor]:
    """Batches of validation rows `[B, T]`, those of `benchmarks/modes`."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    corpus = load_corpus(args.source)
    rows = make_blocks(corpus, tokenizer, block_length=args.block_length, group_size=group_size)["validation"]
    return list(torch.tensor(rows[: args.max_rows]["input_ids"]).split(args.batch_size))


@torch.no_grad()
def mean_loss(model: MoTPreTrainedModel, batches: list[Tensor]) -> float:
    """Mean loss in nats per predicted token."""
    on_device = [rows.to(model.device) for rows in batches]
    losses = [model(rows, labels=rows).loss.item() * len(rows) for rows in on_device]
    return sum(losses) / sum(map(len, batches))


def measure_way(model_dir: str, arguments: dict[str, Any], batches: list[Tensor]) -> dict[str, float]:
    """Load a model in one way, and measure the bytes it holds and its loss."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, **arguments).set_mixing(inference_mixing="per_sequence")
    return {"bytes": sum(map(bytes_of, model.state_dict().values())), "loss": mean_loss(model, batches)}


def measure(model_dir: str, args: Arguments) -> dict[str, Any]:
    """Measure a model stored in every way."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    batches = load_rows(model_dir, args, model.config.group_size)
    return {
        "model": Path(model_dir).name,
        "num_experts": model.config.num_experts,
        "shares": count_shares(model),
        "ways": {name: measure_way(model_dir, arguments, batches) for name, arguments in WAYS.items()},
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
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    corpus = asdict(default_corpus_info())
    del corpus["source"]  # a folder of this machine
    record = {
        "results": results,
        "arguments": asdict(args),
        "corpus": args.source or corpus,
        "versions": {name: version(name) for name in ("torch", "transformers", "torchao", "bitsandbytes")},
    }
    (folder / "quantization.json").write_text(json.dumps(record, indent=2) + "\n")
    (folder / "quantization.md").write_text(make_table(results))
    print(make_table(results))


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
