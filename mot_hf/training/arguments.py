"""Arguments of the training scripts, from the command line or a YAML recipe."""

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
    """Arguments that record which values came only from a recipe.

    A value on the command line is meant for this run. A recipe is written for all runs of its kind: if a checkpoint or
    a tokenizer already has another value, the recipe's value is not meant.
    """

    from_recipe: frozenset[str] = field(default=frozenset(), init=False, repr=False, compare=False)

    def is_meant(self, name: str) -> bool:
        """Checks whether a value was given, and not only by a recipe."""
        return getattr(self, name) is not None and name not in self.from_recipe


@dataclass
class ModelArguments(GivenArguments):
    """Architecture of a new model, or a checkpoint; fields that are not set have the defaults of [`MoTConfig`].

    A checkpoint keeps its architecture: only the fields from `num_experts_per_tok` on can be changed.
    """

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "checkpoint to train further with its tokenizer, instead of a new model"}
    )
    hidden_size: int | None = field(default=None, metadata={"help": "model width D; 512 by default"})
    intermediate_size: int | None = field(
        default=None, metadata={"help": "width of the dense feed-forward layers; 1408 by default"}
    )
    num_hidden_layers: int | None = field(default=None, metadata={"help": "number of blocks; 8 by default"})
    num_attention_heads: int | None = field(default=None, metadata={"help": "number of attention heads; 8 by default"})
    mlp_layer_types: list[str] | None = field(
        default=None, metadata={"help": "'dense' or 'sparse' (MoT) for each block; by default, the later half is MoT"}
    )
    tie_word_embeddings: bool | None = field(
        default=None, metadata={"help": "whether to tie the output projection to the embedding; false by default"}
    )
    group_size: int | None = field(
        default=None, metadata={"help": "rows G whose tokens are mixed together; 32 by default"}
    )
    num_experts: int | None = field(default=None, metadata={"help": "experts E of each MoT layer; 256 by default"})
    router_initializer_range: float | None = field(
        default=None, metadata={"help": "standard deviation of the controllers' initial weights; 0.02 in the paper"}
    )
    num_experts_per_tok: int | None = field(
        default=None, metadata={"help": "experts K per token in modes per_sequence and moe; E / G by default"}
    )
    mixing: str | None = field(default=None, metadata={"help": "mixing mode for training"})
    inference_mixing: str | None = field(default=None, metadata={"help": "mixing mode for evaluation and inference"})
    norm_topk_prob: bool | None = field(default=None, metadata={"help": "whether mode moe renormalises its K weights"})
    output_router_logits: bool | None = field(
        default=None, metadata={"help": "whether mode moe adds the load-balancing loss"}
    )
    router_aux_loss_coef: float | None = field(default=None, metadata={"help": "weight of the load-balancing loss"})

    def config_fields(self) -> dict[str, Any]:
        """The fields of [`MoTConfig`] that are set: for a checkpoint, only those that can be changed."""
        names = [each.name for each in fields(self) if each.init and each.name != "model_name_or_path"]
        if self.model_name_or_path is not None:
            names = names[names.index("num_experts_per_tok") :]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def check_checkpoint(self, config: MoTConfig) -> None:
        """Rejects values that cannot be changed for a checkpoint; if they come from a recipe, it only warns.

        Args:
            config ([`MoTConfig`]): Configuration of the checkpoint to train further.

        Raises:
            ValueError: A value differs. The message lists both values.
        """
        given = [each.name for each in fields(self) if hasattr(config, each.name)]
        fixed = [name for name in given if getattr(self, name) is not None and name not in self.config_fields()]
        wrong = [name for name in fixed if getattr(self, name) != getattr(config, name)]
        if meant := [name for name in wrong if self.is_meant(name)]:
            values = "; ".join(
                f"{name}={getattr(self, name)!r} instead of {getattr(config, name)!r}" for name in meant
            )
            raise ValueError(
                "The architecture of a checkpoint cannot be changed, but the arguments differ from "
                f"`model_name_or_path={self.model_name_or_path!r}`: {values}. Remove these arguments, or train a new "
                "model."
            )
        if wrong:
            logger.warning(
                "The recipe's values %s are ignored, as they are for a new model: the checkpoint %r keeps its own.",
                ", ".join(f"{name}={getattr(self, name)!r}" for name in wrong),
                self.model_name_or_path,
            )


@dataclass
class CorpusArguments(GivenArguments):
    """The text, the tokenizer and the rows."""

    source: str | None = field(
        default=None,
        metadata={
            "help": "text file, file of rows (.jsonl, .json, .csv, .tsv, .parquet), folder or glob of such files, or "
            "name of a data set; by default, Python's standard library"
        },
    )
    validation_source: str | None = field(
        default=None,
        metadata={"help": "text to evaluate on, given like source; by default, a part of source is held out"},
    )
    validation_fraction: float = field(
        default=0.05, metadata={"help": "fraction of source to hold out if it has no validation split"}
    )
    config_name: str | None = field(default=None, metadata={"help": "configuration of a data set loaded by name"})
    text_column: str = field(default="text", metadata={"help": "column of the rows with the text"})
    streaming: bool = field(default=False, metadata={"help": "whether to read the text on the fly"})
    buffer_size: int = field(default=10_000, metadata={"help": "number of rows to shuffle together (streaming only)"})
    tokenizer: str | None = field(
        default=None, metadata={"help": "name or folder of a tokenizer; by default, a new one is trained on the text"}
    )
    vocab_size: int | None = field(
        default=None,
        metadata={"help": "vocabulary size of the tokenizer that is trained on the text; 4096 by default"},
    )
    block_length: int = field(default=128, metadata={"help": "number T of tokens per row"})
    mlm_probability: float = field(default=0.15, metadata={"help": "fraction of tokens to mask (masked models only)"})
    max_eval_rows: int = field(
        default=512, metadata={"help": "maximum number of validation rows to evaluate during training"}
    )

    def text_name(self) -> str:
        """Name of the text in the model card."""
        return name_source(self.source)


@dataclass
class MethodArguments:
    """What a run does besides training all parameters."""

    monitor_mixing: bool = field(default=True, metadata={"help": "whether to log statistics of the mixing"})
    transition_share: float | None = field(
        default=None,
        metadata={"help": "fraction of the steps after which training continues in mode moe (transition tuning)"},
    )
    early_stopping_patience: int = field(
        default=0,
        metadata={"help": "stop after this many evaluations without a better metric_for_best_model; 0 for never"},
    )
    lora_rank: int = field(default=0, metadata={"help": "rank of the LoRA adapters; 0 to train all parameters"})
    lora_alpha: int = field(
        default=16, metadata={"help": "scale of the LoRA adapters, which is divided by their rank"}
    )


def parse_arguments(dataclasses: Sequence[type], argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Parses `[RECIPE.yaml] [--name value ...]`; the command line takes precedence over the recipe.

    Args:
        dataclasses (`Sequence[type]`): Dataclasses of the arguments. No two may share a field name.
        argv (`Sequence[str]`, *optional*): Arguments; by default, those of the process.

    Returns:
        `tuple`: One instance per dataclass.

    Raises:
        ValueError: The recipe is not a mapping, or has an unknown argument.
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
            raise ValueError(f"Recipe {str(path)!r} has unknown arguments: {', '.join(unknown)}. See `--help`.")
        parser.set_defaults(**recipe)
    parsed = parser.parse_args_into_dataclasses(arguments)
    from_recipe = frozenset(recipe) - _names_given(dataclasses, arguments)
    for each in parsed:
        if isinstance(each, GivenArguments):
            each.from_recipe = from_recipe
    return parsed


def _names_given(dataclasses: Sequence[type], arguments: Sequence[str]) -> set[str]:
    """The names of the arguments that a command line sets, even if to their defaults."""
    parser = HfArgumentParser(dataclasses)
    for action in parser._actions:
        action.default = SUPPRESS
    return set(vars(parser.parse_known_args(arguments)[0]))
