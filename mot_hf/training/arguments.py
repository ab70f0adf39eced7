"""What the training scripts can be told, on the command line or in a YAML recipe."""

import logging
import sys
from argparse import SUPPRESS
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from mot_hf.data.sources import name_source
from mot_hf.modeling import MoTConfig

logger = logging.getLogger(__name__)


@dataclass
class GivenArguments:
    """Arguments that know which of them only a recipe gave.

    Someone who gives a value means it. A recipe is for all runs of its kind: where a checkpoint or a tokenizer has
    another value already, the recipe's is not meant.
    """

    from_recipe: frozenset[str] = field(default=frozenset(), init=False, repr=False, compare=False)

    def is_meant(self, name: str) -> bool:
        """Tells whether a value was given, and not only by a recipe."""
        return getattr(self, name) is not None and name not in self.from_recipe


@dataclass
class ModelArguments(GivenArguments):
    """Architecture of a new model, or a checkpoint; what is not given here has the default of [`MoTConfig`].

    A checkpoint has its architecture, and the fields from `num_experts_per_tok` on can be changed.
    """

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "checkpoint to train further, with its tokenizer, in place of a new model"}
    )
    hidden_size: int | None = field(default=None, metadata={"help": "model width D; 512 by default"})
    intermediate_size: int | None = field(
        default=None, metadata={"help": "width of the dense feed-forward layers; 1408 by default"}
    )
    num_hidden_layers: int | None = field(default=None, metadata={"help": "number of blocks; 8 by default"})
    num_attention_heads: int | None = field(default=None, metadata={"help": "number of attention heads; 8 by default"})
    mlp_layer_types: list[str] | None = field(
        default=None, metadata={"help": "'dense' or 'sparse' (MoT) for each block; by default the later half is MoT"}
    )
    tie_word_embeddings: bool | None = field(
        default=None, metadata={"help": "whether the output projection shares the embedding's weight; by default not"}
    )
    group_size: int | None = field(default=None, metadata={"help": "rows G whose tokens are mixed; 32 by default"})
    num_experts: int | None = field(default=None, metadata={"help": "experts E of a MoT layer; 256 by default"})
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
        names = [each.name for each in fields(self) if each.init and each.name != "model_name_or_path"]
        if self.model_name_or_path is not None:
            names = names[names.index("num_experts_per_tok") :]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def check_checkpoint(self, config: MoTConfig) -> None:
        """Refuses values that the checkpoint to train further does not let change; of a recipe's it only says so.

        Args:
            config ([`MoTConfig`]): Configuration of that checkpoint.

        Raises:
            ValueError: A value differs; says which with both values.
        """
        given = [each.name for each in fields(self) if hasattr(config, each.name)]
        fixed = [name for name in given if getattr(self, name) is not None and name not in self.config_fields()]
        wrong = [name for name in fixed if getattr(self, name) != getattr(config, name)]
        if meant := [name for name in wrong if self.is_meant(name)]:
            values = "; ".join(f"{name}={getattr(self, name)!r}, there {getattr(config, name)!r}" for name in meant)
            raise ValueError(
                f"A checkpoint keeps its architecture, and that of `model_name_or_path={self.model_name_or_path!r}` "
                f"is not what is asked for: {values}. Leave these arguments out, or train a new model."
            )
        if wrong:
            logger.warning(
                "The recipe's %s are those of a new model: the checkpoint %r keeps its own.",
                ", ".join(f"{name}={getattr(self, name)!r}" for name in wrong),
                self.model_name_or_path,
            )


@dataclass
class CorpusArguments(GivenArguments):
    """Text, tokenizer and rows."""

    source: str | None = field(
        default=None,
        metadata={
            "help": "text file, file of rows (.jsonl, .json, .csv, .tsv, .parquet), folder or glob of either, or data "
            "set's name; by default Python's library"
        },
    )
    validation_source: str | None = field(
        default=None,
        metadata={"help": "text to evaluate on, of the same kinds; by default a part of source is held out"},
    )
    validation_fraction: float = field(
        default=0.05, metadata={"help": "share of source that is held out where it has no validation split of its own"}
    )
    config_name: str | None = field(default=None, metadata={"help": "configuration of a data set loaded by name"})
    text_column: str = field(default="text", metadata={"help": "column of rows that holds the text"})
    streaming: bool = field(default=False, metadata={"help": "whether to read the text as it is needed"})
    buffer_size: int = field(default=10_000, metadata={"help": "rows that are shuffled together (streaming only)"})
    tokenizer: str | None = field(
        default=None, metadata={"help": "name or folder of a tokenizer; by default one is trained on the text"}
    )
    vocab_size: int | None = field(
        default=None, metadata={"help": "size of the tokenizer that is trained on the text; 4096 by default"}
    )
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
    parser, recipe = HfArgumentParser(dataclasses), {}
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
    parsed = parser.parse_args_into_dataclasses(arguments)
    from_recipe = frozenset(recipe) - _names_given(dataclasses, arguments)
    for each in parsed:
        if isinstance(each, GivenArguments):
            each.from_recipe = from_recipe
    return parsed


def _names_given(dataclasses: Sequence[type], arguments: Sequence[str]) -> set[str]:
    """The names of the arguments that a command line gives a value, be it the default."""
    parser = HfArgumentParser(dataclasses)
    for action in parser._actions:
        action.default = SUPPRESS
    return set(vars(parser.parse_known_args(arguments)[0]))
