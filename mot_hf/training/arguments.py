"""What the training scripts can be told, on the command line or in a YAML recipe."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from mot_hf.sources import name_source


@dataclass
class ModelArguments:
    """Architecture of a new model, or a checkpoint; what is not given here has the default of [`MoTConfig`].

    A checkpoint has its architecture, and the fields from `num_experts_per_tok` on can be changed.
    """

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "checkpoint to train further, with its tokenizer, in place of a new model"}
    )
    hidden_size: int = field(default=512, metadata={"help": "model width D"})
    intermediate_size: int = field(default=1408, metadata={"help": "width of the dense feed-forward layers"})
    num_hidden_layers: int = field(default=8, metadata={"help": "number of blocks"})
    num_attention_heads: int = field(default=8, metadata={"help": "number of attention heads"})
    mlp_layer_types: list[str] | None = field(
        default=None, metadata={"help": "'dense' or 'sparse' (MoT) for each block; by default the later half is MoT"}
    )
    tie_word_embeddings: bool = field(
        default=False, metadata={"help": "whether the output projection shares the embedding's weight"}
    )
    group_size: int = field(default=32, metadata={"help": "rows G whose tokens are mixed"})
    num_experts: int = field(default=256, metadata={"help": "experts E of a MoT layer"})
    router_initializer_range: float | None = field(
        default=None, metadata={"help": "standard deviation of the controllers' weights at first; the paper's is 0.02"}
    )
    num_experts_per_tok: int | None = field(
        default=None, metadata={"help": "experts K run for a token in modes per_sequence and moe; by default E / G"}
    )
    mixing: str | None = field(default=None, metadata={"help": "mixing mode in training"})
    inference_mixing: str | None = field(default=None, metadata={"help": "mixing mode in evaluation"})
    norm_topk_prob: bool | None = field(default=None, metadata={"help": "whether mode moe renormalises its K weights"})
    output_router_logits: bool | None = field(
        default=None, metadata={"help": "whether mode moe adds the load-balancing loss"}
    )
    router_aux_loss_coef: float | None = field(default=None, metadata={"help": "weight of the load-balancing loss"})

    def config_fields(self) -> dict[str, Any]:
        """The fields of [`MoTConfig`] that are given: of a new model, or those that a checkpoint lets change."""
        fields = {name: value for name, value in asdict(self).items() if value is not None}
        if fields.pop("model_name_or_path", None) is None:
            return fields
        names = list(asdict(self))
        changeable = names[names.index("num_experts_per_tok") :]
        return {name: value for name, value in fields.items() if name in changeable}


@dataclass
class CorpusArguments:
    """Text, tokenizer and rows."""

    source: str | None = field(
        default=None,
        metadata={"help": "text file, folder, glob, data set's name, or file of rows; by default Python's library"},
    )
    config_name: str | None = field(default=None, metadata={"help": "configuration of a data set loaded by name"})
    text_column: str = field(default="text", metadata={"help": "column of a data set that holds the text"})
    streaming: bool = field(default=False, metadata={"help": "whether to read the text as it is needed"})
    buffer_size: int = field(default=10_000, metadata={"help": "rows that are shuffled together (streaming only)"})
    tokenizer: str | None = field(
        default=None, metadata={"help": "name or folder of a tokenizer; by default one is trained on the text"}
    )
    vocab_size: int = field(default=4096, metadata={"help": "size of the tokenizer that is trained on the text"})
    block_length: int = field(default=128, metadata={"help": "tokens T of a row"})
    mlm_probability: float = field(default=0.15, metadata={"help": "share of masked tokens (masked models only)"})
    max_eval_rows: int = field(default=512, metadata={"help": "validation rows that are evaluated in training"})

    def text_name(self) -> str:
        """What the text is called in a model card."""
        return name_source(self.source)


@dataclass
class MethodArguments:
    """What is done to the model in training, besides training it."""

    monitor_mixing: bool = field(default=True, metadata={"help": "whether to log what the mixing does"})
    transition_share: float | None = field(
        default=None,
        metadata={"help": "share of the steps after which training goes on in mode moe (transition tuning)"},
    )
    early_stopping_patience: int = field(
        default=0, metadata={"help": "evaluations without a better metric_for_best_model to stop after; 0 for never"}
    )
    lora_rank: int = field(default=0, metadata={"help": "rank of LoRA adapters; 0 trains all parameters"})
    lora_alpha: int = field(default=16, metadata={"help": "scale of LoRA adapters, divided by their rank"})


def parse_arguments(dataclasses: Sequence[type], argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Reads `[RECIPE.yaml] [--name value ...]`; the command line wins over the recipe.

    Args:
        dataclasses (`Sequence[type]`): Dataclasses of the arguments, no two with a field of the same name.
        argv (`Sequence[str]`, *optional*): Arguments; by default those of the process.

    Returns:
        `tuple`: One instance of each dataclass.

    Raises:
        ValueError: The recipe is no mapping, or names an argument that does not exist.
        OSError: The recipe cannot be read.
    """
    parser = HfArgumentParser(dataclasses)
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        path = Path(arguments.pop(0))
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(recipe, dict):
            raise ValueError(f"Recipe {str(path)!r} must be a mapping of argument names to values.")
        known = {action.dest for action in parser._actions}
        if unknown := sorted(map(str, set(recipe) - known)):
            raise ValueError(f"Recipe {str(path)!r} names unknown arguments: {', '.join(unknown)}. See `--help`.")
        parser.set_defaults(**recipe)
    return parser.parse_args_into_dataclasses(arguments)
