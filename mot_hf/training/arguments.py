"""What the training scripts can be told, on the command line or in a YAML recipe."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


@dataclass
class ModelArguments:
    """Architecture of a new model; what is not given here has the default of [`MoTConfig`]."""

    hidden_size: int = field(default=512, metadata={"help": "model width D"})
    intermediate_size: int = field(default=1408, metadata={"help": "width of the dense feed-forward layers"})
    num_hidden_layers: int = field(default=8, metadata={"help": "number of blocks, the later half of them MoT"})
    num_attention_heads: int = field(default=8, metadata={"help": "number of attention heads"})
    group_size: int = field(default=32, metadata={"help": "rows G whose tokens are mixed"})
    num_experts: int = field(default=256, metadata={"help": "experts E of a MoT layer"})


@dataclass
class CorpusArguments:
    """Text, tokenizer and rows."""

    source: str | None = field(
        default=None, metadata={"help": "text file, folder, glob or data set; by default Python's standard library"}
    )
    vocab_size: int = field(default=4096, metadata={"help": "size of the tokenizer that is trained on the text"})
    block_length: int = field(default=128, metadata={"help": "tokens T of a row"})
    mlm_probability: float = field(default=0.15, metadata={"help": "share of masked tokens (masked models only)"})
    max_eval_rows: int = field(default=512, metadata={"help": "validation rows that are evaluated in training"})


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
