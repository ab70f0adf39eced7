"""Mixture-of-Tokens model configuration."""

import copy
import os
import sys
from difflib import get_close_matches
from importlib.metadata import version
from math import gcd, sqrt
from typing import Any, Literal, NoReturn, Self, cast

from transformers.utils import logging
from transformers.utils.versions import require_version

logger = logging.get_logger(__name__)

# Checked before the imports below, which fail in older versions: a checkpoint loads this file first.
require_version("transformers>=5.17", "MoT models need it: `pip install --upgrade transformers`.")
require_version("torch>=2.11", "MoT models need it: `pip install --upgrade torch`.")

from huggingface_hub.dataclasses import strict  # noqa: E402
from huggingface_hub.errors import StrictDataclassClassValidationError  # noqa: E402
from transformers.configuration_utils import PreTrainedConfig  # noqa: E402
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters  # noqa: E402

# The newest version of transformers that the tests were run with.
NEWEST_TESTED = "5.24"

try:
    major, minor = NEWEST_TESTED.split(".")
    require_version(f"transformers<{major}.{int(minor) + 1}.dev0")
except ImportError:
    # Newer versions have renamed arguments before, and older code then gave wrong results without an error.
    logger.warning_once(
        f"This code of MoT models was tested with transformers up to {NEWEST_TESTED}, and runs on "
        f"{version('transformers')}. Compare results, or `pip install 'transformers=={NEWEST_TESTED}.*'`."
    )

MixingMode = Literal["cross_example", "per_sequence", "moe"]

_AT_LEAST_ONE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "num_experts",
)
# A larger size is a mistake or an attack. Without a limit, lists and modules would be made until memory runs out.
_LARGEST = {"num_hidden_layers": 10_000, "num_labels": 1_000_000}
_LARGEST_SIZE = 2**31 - 1
# Numbers among the parameters of a rotary embedding; the others are choices.
_ROPE_NUMBERS = (
    "rope_theta",
    "factor",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "short_factor",
    "long_factor",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
)
_SIZES = (*_AT_LEAST_ONE, "group_size", "head_dim", "moe_intermediate_size", "num_experts_per_tok", "num_labels")


@strict
class MoTConfig(PreTrainedConfig):
    r"""
    Configuration of a Mixture-of-Tokens (MoT) model: a Qwen3 backbone in which some feed-forward layers are MoT layers
    (arXiv 2310.15961). The defaults are about the paper's MoT-Medium/32E/8: 8 blocks of width 512, the later half of
    them MoT, groups of 32 tokens, 256 experts of an eighth of the dense width each.

    Args:
        vocab_size (`int`, *optional*, defaults to 50257):
            Number of tokens in the vocabulary.
        hidden_size (`int`, *optional*, defaults to 512):
            Model width D, in features.
        intermediate_size (`int`, *optional*, defaults to 1408):
            Width of the dense SwiGLU feed-forward layers, in features; also the width whose FLOPs a MoT layer matches.
        num_hidden_layers (`int`, *optional*, defaults to 8):
            Number of Transformer blocks.
        num_attention_heads (`int`, *optional*, defaults to 8):
            Number of query heads.
        num_key_value_heads (`int`, *optional*):
            Number of key/value heads (grouped-query attention); must divide `num_attention_heads`. Defaults to
            `num_attention_heads`.
        head_dim (`int`, *optional*):
            Width of one attention head, in features; even, because of the rotary embedding. Defaults to
            `hidden_size / num_attention_heads`.
        hidden_act (`str`, *optional*, defaults to `"silu"`):
            Activation of the gate of every feed-forward layer, dense or expert (a name of transformers' `ACT2FN`).
        max_position_embeddings (`int`, *optional*, defaults to 2048):
            Longest sequence the model is meant for, in tokens.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the normal distribution that weights are drawn from.
        router_initializer_range (`float`, *optional*):
            The same for the controllers. Defaults to `2 / sqrt(hidden_size)`: logits then have standard deviation 2,
            and every expert has a few tokens of its own from the first step on. The paper uses `initializer_range`:
            all experts then start with about the same mixture, the group's mean, and take thousands of steps to
            differ.
        rms_norm_eps (`float`, *optional*, defaults to 1e-6):
            Epsilon of the RMS norms.
        use_cache (`bool`, *optional*, defaults to `True`):
            Whether the model returns key/value caches.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Whether the output projection shares the input embedding's weight.
        rope_parameters (`dict`, *optional*):
            Rotary embedding parameters in the format of transformers (`rope_type`, `rope_theta` and the type's own).
            Defaults to the plain rotary embedding with theta 10000.
        attention_bias (`bool`, *optional*, defaults to `False`):
            Whether the attention projections have biases.
        attention_dropout (`float`, *optional*, defaults to 0.0):
            Dropout probability of the attention weights in training, in [0, 1).
        is_causal (`bool`, *optional*, defaults to `True`):
            Whether attention sees only the past. `MoTForMaskedLM` uses a copy of the configuration in which this is
            `False`; `MoTForCausalLM` refuses `False`.
        mlp_layer_types (`list[str]`, *optional*):
            Type of each block's feed-forward layer: `"dense"`, or `"sparse"`, which means MoT. Defaults to dense in
            the earlier half of the blocks and MoT in the later half, as in the paper.
        group_size (`int`, *optional*, defaults to 32):
            Number G of rows (examples) whose tokens at one column are mixed together in training, at least 2.
        num_experts (`int`, *optional*, defaults to 256):
            Number E of experts of a MoT layer.
        moe_intermediate_size (`int`, *optional*):
            Width F of one expert, in features. Defaults to the FLOP match
            `intermediate_size * group_size / num_experts`, at which a MoT layer in mode `cross_example` costs as much
            per token as the dense feed-forward layer.
        num_experts_per_tok (`int`, *optional*):
            Number K of experts run for one token in modes `per_sequence` and `moe`, from 1 to `num_experts`. Defaults
            to `max(1, num_experts // group_size)`, which takes as many FLOPs as training.
        norm_topk_prob (`bool`, *optional*):
            Whether mode `moe` renormalises the weights of the K selected experts to sum to 1. Defaults to `True` where
            K is at least 2. A single expert's weight would always be 1, and the loss would not train the controllers.
        output_router_logits (`bool`, *optional*, defaults to `False`):
            Whether to return the controllers' logits and, in mode `moe`, to add the load-balancing loss to the loss.
            Language models alone do so: classification and question answering have neither.
        router_aux_loss_coef (`float`, *optional*, defaults to 0.01):
            Weight of the load-balancing loss (language models in mode `moe` only), in units of the loss.
        mixing (`str`, *optional*, defaults to `"cross_example"`):
            Mixing mode in training: `"cross_example"`, `"per_sequence"` or `"moe"`.
        inference_mixing (`str`, *optional*):
            Mixing mode in evaluation and generation. Defaults to `"moe"` if `mixing` is `"moe"`, else to
            `"per_sequence"`.
        companion_momentum (`float`, *optional*, defaults to 0.1):
            Weight of the newest micro-batch in the running statistics of the typical group, in (0, 1], as in
            `torch.nn.BatchNorm1d`.
        norm_mixing_weights (`bool`, *optional*, defaults to `False`):
            Whether the weights by which a token receives its experts' outputs are normalised to sum to 1: in mode
            `per_sequence` those of the K experts that are run, while the others contribute nothing in place of their
            mean outputs; in mode `cross_example` those of all E experts. The weights within mixtures stay as they
            are. `False` is the paper's layer. `True` is for models that are trained in mode `per_sequence`; in mode
            `cross_example` it is refused in float16.
        live_companions (`bool`, *optional*, defaults to `False`):
            Whether training in mode `per_sequence` updates the running statistics of the typical group too, from the
            groups that the rows of each micro-batch would form. `False` keeps those that the model has; those of a new
            model are 0, which gave a lower loss in our measurements.
        pad_token_id (`int`, *optional*):
            Id of the padding token.
        bos_token_id (`int`, *optional*):
            Id of the token that begins a sequence.
        eos_token_id (`int` or `list[int]`, *optional*):
            Id of the token that ends a sequence, or ids of several.

    Raises:
        StrictDataclassFieldValidationError: A value has the wrong type or is not one of the words allowed.
        StrictDataclassClassValidationError: A value is out of range or does not fit the others. The message names the
            field, the value and what would be right.

    Example:

    ```python
    >>> from mot_hf import MoTConfig, MoTForCausalLM

    >>> config = MoTConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, group_size=4, num_experts=8)
    >>> config.moe_intermediate_size, config.num_experts_per_tok, config.mlp_layer_types
    (64, 2, ['dense', 'sparse'])
    >>> model = MoTForCausalLM(config)
    ```
    """

    model_type = "mot"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "router_logits", "aux_loss"]
    attribute_map = {"num_local_experts": "num_experts"}
    # How transformers and servers spread the backbone over processes, in words that both know: as Qwen3-MoE. Before
    # transformers spreads a model, [`name_own_style`] puts another style in the place of `moe_tp_experts`.
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    # The styles of earlier versions do not let rows travel. Pyright: the type that transformers declares is another's.
    base_model_ep_plan = (  # pyright: ignore[reportAssignmentType]
        {
            "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
            "layers.*.mlp.experts.down_proj": "grouped_gemm",
            "layers.*.mlp.experts": "ep_dispatch_experts",
        }
        if [int(part) for part in version("transformers").split(".")[:2]] >= [5, 19]
        else None
    )
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 50257
    hidden_size: int = 512
    intermediate_size: int = 1408
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float | int = 0.02  # `@strict` takes types literally: `float` alone would refuse 1
    router_initializer_range: float | int | None = None
    rms_norm_eps: float | int = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    is_causal: bool = True
    mlp_layer_types: list[str] | None = None
    group_size: int = 32
    num_experts: int = 256
    moe_intermediate_size: int | None = None
    num_experts_per_tok: int | None = None
    norm_topk_prob: bool | None = None
    output_router_logits: bool = False
    router_aux_loss_coef: float | int = 0.01
    mixing: MixingMode = "cross_example"
    inference_mixing: MixingMode | None = None
    companion_momentum: float | int = 0.1
    norm_mixing_weights: bool = False
    live_companions: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: object) -> None:
        """Derive the fields left at `None`. Those that cannot be derived stay `None`, and validation explains why."""
        for alias, name in self.attribute_map.items():  # before others are derived from them
            if alias in kwargs:
                setattr(self, name, kwargs.pop(alias))
        self._refuse_unfit(kwargs)
        # `max(1, ...)` and `_whole`, because sizes of 0 are refused only after this, by `validate_architecture`.
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = _whole(self.hidden_size, self.num_attention_heads)
        self._derive_experts()
        if self.router_initializer_range is None:
            self.router_initializer_range = 2 / sqrt(max(1, self.hidden_size))
        if self.mlp_layer_types is None:
            num_dense = self.num_hidden_layers // 2
            self.mlp_layer_types = ["dense"] * num_dense + ["sparse"] * (self.num_hidden_layers - num_dense)
        if self.inference_mixing is None:
            self.inference_mixing = _mode_of_inference(self.mixing)
        self._name_misspelled(kwargs)
        try:
            super().__post_init__(**kwargs)
        except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
            raise StrictDataclassClassValidationError("validate_types", error) from error
        # All heads: on its own, transformers enters only the class that is saved.
        if getattr(self, "auto_map", None) is None:
            self.auto_map = _auto_map()

    def _derive_experts(self) -> None:
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = _whole(self.intermediate_size * self.group_size, self.num_experts)
        if self.num_experts_per_tok is None:
            self.num_experts_per_tok = max(1, self.num_experts // max(1, self.group_size))
        if self.norm_topk_prob is None:
            self.norm_topk_prob = self.num_experts_per_tok > 1

    def _refuse_unfit(self, others: dict[str, Any]) -> None:
        """Refuse at once values from which no others could be derived."""
        for name in _SIZES:
            value, largest = others.get(name, getattr(self, name, None)), _LARGEST.get(name, _LARGEST_SIZE)
            if isinstance(value, int) and value > largest:
                _refuse("validate_architecture", f"`{name}` must be at most {largest}, got {value}.")
        dtype = self.dtype or others.get("torch_dtype")
        if isinstance(dtype, str) and not _is_floating_point(dtype):
            _refuse("validate_dtype", f"`dtype` must be a floating point type such as 'float32', got {dtype!r}.")

    def _name_misspelled(self, unknown: dict[str, object]) -> None:
        """Warn of unknown fields whose names are close to an existing field's."""
        for name in unknown:
            nearest = get_close_matches(name, self.__dataclass_fields__, n=1, cutoff=0.85)
            if nearest and not hasattr(type(self), name) and name not in self.attribute_map:
                logger.warning_once(
                    f"`MoTConfig` has no field `{name}`: did you mean `{nearest[0]}`? It changes nothing."
                )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """Make a configuration from a saved one with changes, and check both together.

        Args:
            config_dict (`dict[str, Any]`): The saved fields.
            kwargs: Fields to change. A smaller `num_hidden_layers` keeps the first layers, and another `mixing` sets
                `inference_mixing` to its default.

        Returns:
            `MoTConfig`: The configuration; with `return_unused_kwargs=True` also the arguments that are not fields.

        Raises:
            StrictDataclassClassValidationError: The fields do not fit together.
        """
        layer_types, num_layers = config_dict.get("mlp_layer_types"), kwargs.get("num_hidden_layers")
        if isinstance(layer_types, list) and isinstance(num_layers, int):
            kwargs.setdefault("mlp_layer_types", layer_types[:num_layers])
        # The saved `inference_mixing` fits the saved `mixing`, not the new one.
        if (mixing := kwargs.get("mixing")) and (mixing == "moe" or mixing != config_dict.get("mixing", mixing)):
            kwargs.setdefault("inference_mixing", _mode_of_inference(mixing))
        # `validate_norm_topk_prob` must not warn of a saved value that is changed.
        config_dict = config_dict | {
            name: kwargs[name] for name in ("norm_topk_prob", "num_experts_per_tok") if name in kwargs
        }
        # transformers validates the saved fields, then sets the changes without validating both together.
        made = super().from_dict(config_dict, **kwargs)
        (made[0] if isinstance(made, tuple) else made).validate()
        return made

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Save the configuration and the code of the models, under the names that the Auto classes load it by.

        Args:
            save_directory (`str` or `os.PathLike`): Folder, created if it does not exist.
            push_to_hub (`bool`, *optional*, defaults to `False`): Whether to upload the folder's new files too.
            kwargs: Passed on to `push_to_hub`.
        """
        config = copy.copy(self)  # so that saving does not change the configuration in memory
        config.auto_map = _auto_map()
        super(MoTConfig, config).save_pretrained(save_directory, push_to_hub, **kwargs)

    def validate_architecture(self) -> None:
        """Check that every size is at least 1, and a group at least 2.

        Validators run in alphabetical order. With this name it runs before those that divide by a size.
        """
        super().validate_architecture()
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.group_size < 2:
            raise ValueError(
                f"`group_size` must be at least 2, got {self.group_size}: a group of one mixes nothing. For inference "
                "on single sequences keep the group size of training; mode `per_sequence` needs no other rows."
            )

    def validate_ranges(self) -> None:
        """Check the ranges of the real-valued fields."""
        # The comparisons are false for NaN, and for infinity by the largest float.
        in_range = {
            "a finite number greater than 0": {
                name: 0 < getattr(self, name) <= sys.float_info.max
                for name in ("initializer_range", "router_initializer_range", "rms_norm_eps")
            },
            "a finite number of at least 0": {
                "router_aux_loss_coef": 0 <= self.router_aux_loss_coef <= sys.float_info.max
            },
            "in [0, 1)": {"attention_dropout": 0 <= self.attention_dropout < 1},
            "in (0, 1]": {"companion_momentum": 0 < self.companion_momentum <= 1},
        }
        for wanted, names in in_range.items():
            for name, fits in names.items():
                if not fits:
                    raise ValueError(f"`{name}` must be {wanted}, got {getattr(self, name)}.")

    def validate_heads(self) -> None:
        """Check that the attention heads fit the width and each other."""
        num_key_value_heads = cast(int, self.num_key_value_heads)
        if self.num_attention_heads % num_key_value_heads != 0:
            raise ValueError(
                f"`num_key_value_heads` ({num_key_value_heads}) must divide `num_attention_heads` "
                f"({self.num_attention_heads})."
            )
        if self.head_dim is None:
            raise ValueError(
                f"`head_dim` is not given and `hidden_size` ({self.hidden_size}) is not a multiple of "
                f"`num_attention_heads` ({self.num_attention_heads}): set `head_dim` or change one of the two."
            )
        if self.head_dim < 2 or self.head_dim % 2 != 0:
            raise ValueError(
                f"`head_dim` must be even and at least 2 for the rotary embedding, got {self.head_dim} "
                f"(default: hidden_size / num_attention_heads = {self.hidden_size} / {self.num_attention_heads})."
            )

    def validate_experts(self) -> None:
        """Check the experts' width, and how many of them run for a token."""
        if self.moe_intermediate_size is None:
            step = self.num_experts // gcd(self.num_experts, self.group_size)
            nearest = max(step, round(self.intermediate_size / step) * step)
            raise ValueError(
                "`moe_intermediate_size` is not given and the FLOP match intermediate_size * group_size / num_experts "
                f"= {self.intermediate_size} * {self.group_size} / {self.num_experts} is not a whole number: make "
                f"`intermediate_size` a multiple of {step} (nearest: {nearest}) or set `moe_intermediate_size`."
            )
        if self.moe_intermediate_size < 1:
            raise ValueError(f"`moe_intermediate_size` must be at least 1, got {self.moe_intermediate_size}.")
        num_experts_per_tok = cast(int, self.num_experts_per_tok)
        if not 1 <= num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"`num_experts_per_tok` must be from 1 to `num_experts` ({self.num_experts}), "
                f"got {num_experts_per_tok}."
            )

    def validate_norm_topk_prob(self) -> None:
        """Warn of a single selected expert whose weight is renormalised. Saved models may have been tuned so."""
        if self.norm_topk_prob and self.num_experts_per_tok == 1 < self.num_experts:
            logger.warning_once(
                "`norm_topk_prob=True` with `num_experts_per_tok=1`: in mode `moe` the weight of the only expert of a "
                "token is then always 1, whatever its controller says, and the loss does not train controllers. Set "
                "`norm_topk_prob=False`, also in `from_pretrained`, unless the model was tuned with `True`. The other "
                "modes do not use it."
            )

    def validate_mlp_layer_types(self) -> None:
        """Check that there is one known layer type for each block."""
        layer_types = cast(list[str], self.mlp_layer_types)
        if len(layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"`mlp_layer_types` must have one entry for each of the `num_hidden_layers` "
                f"({self.num_hidden_layers}) blocks, got {len(layer_types)}: {layer_types}."
            )
        for word in layer_types:
            if word not in ("dense", "sparse"):
                raise ValueError(f"`mlp_layer_types` may contain 'dense' and 'sparse' (MoT), got {word!r}.")

    def validate_full_attention(self) -> None:
        """Refuse fields of other models that limit how far attention sees."""
        # Layers would ignore them, and caches would drop keys and values that layers need.
        layer_types = getattr(self, "layer_types", None)
        if any(kind != "full_attention" for kind in layer_types or ()):
            raise ValueError(
                f"`layer_types` may contain 'full_attention' only, got {layer_types}: MoT models have no other "
                "attention. Leave it out."
            )
        if getattr(self, "use_sliding_window", None):
            raise ValueError(
                f"`use_sliding_window` must be False, got {self.use_sliding_window!r}: MoT models have full attention "
                "only. Leave it out."
            )
        for name in ("sliding_window", "attention_chunk_size"):
            if (value := getattr(self, name, None)) is not None:
                raise ValueError(
                    f"`{name}` must be None, got {value!r}: MoT models have full attention only. Leave it out."
                )

    def validate_rope(self) -> None:
        """Check the type of the rotary embedding and its numbers."""
        for name, value in (self.rope_parameters or {}).items():
            numbers = value if isinstance(value, list) else [value]
            if name in ("rope_type", "type"):
                if value != "default" and value not in ROPE_INIT_FUNCTIONS:
                    known = ", ".join(sorted({"default", *ROPE_INIT_FUNCTIONS}))
                    raise ValueError(f"`rope_parameters` has the unknown {name} {value!r}: use one of {known}.")
            elif name in _ROPE_NUMBERS and not all(_is_positive(number) for number in numbers):
                raise ValueError(f"`rope_parameters` needs a {name} of positive finite numbers, got {value!r}.")
        try:
            super().validate_rope()
        except KeyError as error:
            raise ValueError(error.args[0]) from error

    def validate_dtype(self) -> None:
        """Check that parameters can have this type."""
        # Servers pass "auto" to `from_pretrained` and resolve it themselves.
        if self.dtype not in (None, "auto") and not _is_floating_point(self.dtype):
            raise ValueError(f"`dtype` must be a floating point type such as 'float32', got {self.dtype!r}.")

    def validate_hidden_act(self) -> None:
        """Check that transformers knows the activation."""
        # Imported here so that reading a configuration does not load torch.
        from transformers.activations import ACT2FN

        if self.hidden_act not in ACT2FN:
            raise ValueError(
                f"`hidden_act` must be a name of transformers' ACT2FN ({', '.join(sorted(ACT2FN))}), "
                f"got {self.hidden_act!r}."
            )

    def validate_token_ids(self) -> None:
        """Warn of special tokens outside the vocabulary.

        This is not an error, because such an id does no harm as long as no text contains it. The `Trainer` also copies
        the ids of a tokenizer here unchecked, so an error would only come at a run's first save.
        """
        eos_token_ids = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        named_ids = [("pad_token_id", self.pad_token_id), ("bos_token_id", self.bos_token_id)]
        for name, token_id in named_ids + [("eos_token_id", token_id) for token_id in eos_token_ids]:
            if token_id is not None and not 0 <= token_id < self.vocab_size:
                enlarge = f" call `model.resize_token_embeddings({token_id + 1})`, or" if token_id > 0 else ""
                logger.warning_once(
                    f"`{name}={token_id}` is not from 0 to vocab_size - 1 ({self.vocab_size - 1}), so the model has "
                    f"no embedding for that token:{enlarge} set it to `None`."
                )


def find_layers(config: MoTConfig, layer_type: str) -> list[int]:
    """Find the blocks with one type of feed-forward layer.

    Args:
        config ([`MoTConfig`]): The configuration.
        layer_type (`str`): The type: `"dense"`, or `"sparse"`, which means MoT.

    Returns:
        `list[int]`: The indices of the blocks, from the lowest up.
    """
    return [index for index, kind in enumerate(cast(list[str], config.mlp_layer_types)) if kind == layer_type]


def _refuse(validator: str, reason: str) -> NoReturn:
    error = ValueError(reason)
    raise StrictDataclassClassValidationError(validator, error) from error


def _is_floating_point(dtype: Any) -> bool:
    # Imported here so that reading a configuration does not load torch.
    import torch

    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def _is_positive(number: Any) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and 0 < number <= sys.float_info.max


def _auto_map() -> dict[str, str]:
    """What each Auto class loads from a checkpoint."""
    # Imported here, because that file imports this one. It is needed here too: transformers copies the files that a
    # file imports, so that with this import each file leads to all the others.
    from .heads_mot import AUTO_MAP

    return dict(AUTO_MAP)


def _mode_of_inference(mixing: MixingMode) -> MixingMode:
    """The default mode of inference for a model trained in mode `mixing`."""
    return "moe" if mixing == "moe" else "per_sequence"


def _whole(numerator: int, denominator: int) -> int | None:
    """The quotient if it is a whole number, else `None`."""
    return numerator // denominator if denominator > 0 and numerator % denominator == 0 else None


__all__ = ["MixingMode", "MoTConfig"]
