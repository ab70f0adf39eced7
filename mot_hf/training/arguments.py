"""What a training run is told: the model, the text and the method."""

import json
import logging
from dataclasses import dataclass, field, fields
from typing import Any

from mot_hf.data.sources import locate_source, name_source
from mot_hf.modeling import MoTConfig
from mot_hf.modeling.configuration_mot import MixingMode
from mot_hf.training.transition import TransitionMode

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

    Every field of the configuration is here, except those that text, tokenizer, head or `Trainer` determine. A
    checkpoint keeps its architecture: only the fields from `num_experts_per_tok` on can be changed.
    """

    _argument_group_name = "the model: a new one, or a checkpoint to train further"

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "checkpoint to train further with its tokenizer, instead of a new model"}
    )
    masked: bool | None = field(
        default=None,
        metadata={"help": "train a masked (bidirectional) language model; by default, what the checkpoint is"},
    )
    hidden_size: int | None = field(default=None, metadata={"help": "model width D; 512 by default"})
    intermediate_size: int | None = field(
        default=None, metadata={"help": "width of the dense feed-forward layers; 1408 by default"}
    )
    num_hidden_layers: int | None = field(default=None, metadata={"help": "number of blocks; 8 by default"})
    num_attention_heads: int | None = field(default=None, metadata={"help": "number of attention heads; 8 by default"})
    num_key_value_heads: int | None = field(
        default=None, metadata={"help": "number of key/value heads; as many as attention heads by default"}
    )
    head_dim: int | None = field(
        default=None, metadata={"help": "width of a head; hidden_size / num_attention_heads by default"}
    )
    hidden_act: str | None = field(default=None, metadata={"help": "activation of the gates; silu by default"})
    mlp_layer_types: list[str] | None = field(
        default=None, metadata={"help": "'dense' or 'sparse' (MoT) for each block; by default, the later half is MoT"}
    )
    tie_word_embeddings: bool | None = field(
        default=None, metadata={"help": "whether to tie the output projection to the embedding; false by default"}
    )
    attention_bias: bool | None = field(
        default=None, metadata={"help": "whether attention projections have biases; false by default"}
    )
    rms_norm_eps: float | None = field(default=None, metadata={"help": "epsilon of the RMS norms; 1e-6 by default"})
    initializer_range: float | None = field(
        default=None, metadata={"help": "standard deviation of initial weights; 0.02 by default"}
    )
    group_size: int | None = field(
        default=None, metadata={"help": "rows G whose tokens are mixed together; 32 by default"}
    )
    num_experts: int | None = field(default=None, metadata={"help": "experts E of each MoT layer; 256 by default"})
    moe_intermediate_size: int | None = field(
        default=None,
        metadata={"help": "width F of an expert; by default, that at which the layer costs as much as a dense one"},
    )
    router_initializer_range: float | None = field(
        default=None, metadata={"help": "standard deviation of the controllers' initial weights; 0.02 in the paper"}
    )
    num_experts_per_tok: int | None = field(
        default=None, metadata={"help": "experts K per token in modes per_sequence and moe; E / G by default"}
    )
    mixing: MixingMode | None = field(default=None, metadata={"help": "mixing mode for training"})
    inference_mixing: MixingMode | None = field(
        default=None, metadata={"help": "mixing mode for evaluation and inference"}
    )
    norm_topk_prob: bool | None = field(
        default=None, metadata={"help": "whether mode moe renormalises its K weights; by default, if K is at least 2"}
    )
    output_router_logits: bool | None = field(
        default=None, metadata={"help": "whether mode moe adds the load-balancing loss"}
    )
    router_aux_loss_coef: float | None = field(default=None, metadata={"help": "weight of the load-balancing loss"})
    companion_momentum: float | None = field(
        default=None, metadata={"help": "weight of the newest batch in the running statistics; 0.1 by default"}
    )
    norm_mixing_weights: bool | None = field(
        default=None, metadata={"help": "whether a token's weights sum to 1 in modes per_sequence and cross_example"}
    )
    live_companions: bool | None = field(
        default=None, metadata={"help": "whether mode per_sequence updates the running statistics; false by default"}
    )
    attention_dropout: float | None = field(
        default=None, metadata={"help": "dropout of the attention weights in training; 0 by default"}
    )
    max_position_embeddings: int | None = field(
        default=None, metadata={"help": "longest sequence that the model is meant for; block_length by default"}
    )
    rope_parameters: dict | str | None = field(
        default=None,
        metadata={"help": 'rotary embedding, such as \'{"rope_type": "default", "rope_theta": 1000000}\''},
    )

    def __post_init__(self) -> None:
        """Read `rope_parameters` as they are given on a command line."""
        if isinstance(self.rope_parameters, str):
            try:
                self.rope_parameters = json.loads(self.rope_parameters)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"`rope_parameters={self.rope_parameters!r}` is not JSON ({error}): write it like "
                    '\'{"rope_type": "default", "rope_theta": 1000000}\'.'
                ) from None

    def config_fields(self) -> dict[str, Any]:
        """The fields of [`MoTConfig`] that are set: for a checkpoint, only those that can be changed."""
        names = [each.name for each in fields(self) if each.init and each.name not in ("model_name_or_path", "masked")]
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

    _argument_group_name = "the text, the tokenizer and the rows"

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
    chat_template: bool = field(
        default=False,
        metadata={
            "help": "whether the tokenizer gets the tokens and the template of chats already now; `mot sft` adds them "
            "otherwise"
        },
    )
    block_length: int = field(default=128, metadata={"help": "number T of tokens per row"})
    mlm_probability: float = field(default=0.15, metadata={"help": "fraction of tokens to mask (masked models only)"})
    max_eval_rows: int = field(
        default=512, metadata={"help": "maximum number of validation rows to evaluate during training"}
    )

    def __post_init__(self) -> None:
        """Refuse an evaluation of no rows, and a share of masked tokens that trains nothing."""
        if self.max_eval_rows < 1:
            raise ValueError(f"`max_eval_rows={self.max_eval_rows}` must be at least 1.")
        if not 0 < self.mlm_probability <= 1:
            raise ValueError(
                f"`mlm_probability={self.mlm_probability}` must be greater than 0 and at most 1: 0.15 is usual."
            )

    def text_name(self) -> str:
        """Name of the text in the model card."""
        return name_source(self.source)

    def text(self) -> dict[str, Any]:
        """Arguments of [`load_corpus`] that read the text again, from any working folder."""
        return {
            "source": locate_source(self.source),
            "validation_source": locate_source(self.validation_source),
            "validation_fraction": self.validation_fraction,
            "config_name": self.config_name,
            "text_column": self.text_column,
            "streaming": self.streaming,
        }


@dataclass
class MethodArguments:
    """What a run does besides training all parameters."""

    _argument_group_name = "the method"

    monitor_mixing: bool = field(default=True, metadata={"help": "whether to log statistics of the mixing"})
    transition_share: float | None = field(
        default=None,
        metadata={
            "help": "fraction of the steps after which training continues in mode moe (transition tuning) or in "
            "transition_mode; 0 for all steps"
        },
    )
    transition_mode: TransitionMode = field(
        default="moe", metadata={"help": "mode in which training continues: moe or per_sequence"}
    )
    balance_rate: float | None = field(
        default=None,
        metadata={
            "help": "what thresholds change by after a step in mode per_sequence, to balance experts without a loss "
            "for it, such as 0.01; by default they are not balanced"
        },
    )
    early_stopping_patience: int = field(
        default=0,
        metadata={"help": "stop after this many evaluations without a better metric_for_best_model; 0 for never"},
    )
    lora_rank: int = field(default=0, metadata={"help": "rank of the LoRA adapters; 0 to train all parameters"})
    lora_alpha: int = field(
        default=16, metadata={"help": "scale of the LoRA adapters, which is divided by their rank"}
    )
    tp_size: int = field(
        default=1, metadata={"help": "processes that share every batch, each with a part of every weight"}
    )
    ep_size: int = field(
        default=1, metadata={"help": "processes among which the experts are divided; part of tp_size * fsdp_size"}
    )
    fsdp_size: int = field(
        default=1, metadata={"help": "processes with batches of their own, among which the weights are divided"}
    )

    def __post_init__(self) -> None:
        """Refuse a patience that would end every run."""
        if self.early_stopping_patience < 0:
            raise ValueError(
                f"`early_stopping_patience={self.early_stopping_patience}` must be at least 1, or 0 for never."
            )
