"""Arguments of a Mixture-of-Tokens model's forward: the cache under either of its names, and no unknown ones."""

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from functools import wraps
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.utils import TransformersKwargs

# The name of the cache in attention, masks, outputs and `generate` of the installed transformers: "cache" since 5.24.
CACHE_NAME = "cache" if "cache" in inspect.signature(Qwen3Attention.forward).parameters else "past_key_values"
_CACHE_NAMES = {"past_key_values", "cache"}

# Arguments of every forward besides its own: those of all models of transformers, of continuous batching, of the
# losses (a head passes the same arguments to its loss and its backbone), and of decorators.
_COMMON_ARGUMENTS = {*TransformersKwargs.__annotations__, *PagedAttentionArgs.__annotations__} - _CACHE_NAMES
_COMMON_ARGUMENTS |= {"num_items_in_batch", "ignore_index", "shift_labels"}
_COMMON_ARGUMENTS |= {"return_dict", "debug_io", "debug_io_dir", "prune_layers"}

# Arguments of the models themselves, which a misspelled one may have been meant for.
_OF_MODELS = _COMMON_ARGUMENTS | _CACHE_NAMES | {"mixing", "token_mask", "inputs_embeds", "labels"}

# Arguments that the attention layer itself passes to its attention function, so that no caller can.
_OF_ATTENTION_LAYER = {*inspect.signature(Qwen3Attention.forward).parameters, *_CACHE_NAMES}
_OF_ATTENTION_LAYER |= {"module", "query", "key", "value", "query_states", "key_states", "value_states"}
_OF_ATTENTION_LAYER |= {"dropout", "scaling", "sliding_window"}


def known_arguments_only(
    forward: Callable[..., Any], backbone_forward: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """Make a forward refuse unknown arguments, which `**kwargs` would silently swallow.

    An argument that is `None` may have any name.

    Args:
        forward (`Callable`): The forward of a model.
        backbone_forward (`Callable`, *optional*): The forward of its backbone, if that gets the remaining arguments.

    Returns:
        `Callable`: The same forward, which raises a `ValueError` before it computes anything.
    """
    known = _names(forward) | (_names(backbone_forward) if backbone_forward else frozenset())
    if known & _CACHE_NAMES:
        known |= _CACHE_NAMES

    @wraps(forward)
    def checked(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        # transformers' pipelines hand over in one dictionary what a forward does not name.
        kwargs |= kwargs.pop("kwargs", None) or {}
        for name, value in kwargs.items():
            if name in known or value is None:
                continue
            if isinstance(value, Cache) or not (
                name in _COMMON_ARGUMENTS or _is_of_attention(self.config._attn_implementation, name)
            ):
                raise ValueError(_explain_unknown(type(self).__name__, name, value, known))
        return forward(self, *args, **kwargs)

    return checked


def merge_caches(past_key_values: Cache | None, cache: Any, kwargs: dict[str, Any]) -> Cache | None:
    """Return the cache of a call, given under its name before transformers 5.24 or its name since.

    Args:
        past_key_values (`Cache`, *optional*): The cache under its older name.
        cache (`Cache` or `PagedAttentionCache`, *optional*): The cache under its newer name.
        kwargs (`dict[str, Any]`): The call's other arguments. Before transformers 5.24, the paged cache of continuous
            batching is put back here, because attention takes it as `cache` in every version.

    Returns:
        `Cache`, *optional*: The cache.

    Raises:
        ValueError: Two caches are given.
    """
    if cache is None:
        return past_key_values
    if CACHE_NAME != "cache" and not isinstance(cache, Cache):
        kwargs["cache"] = cache
        return past_key_values
    if past_key_values is not None and past_key_values is not cache:
        raise ValueError("`cache` and `past_key_values` are two names of one argument: give only one of them.")
    return cache


def _names(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters) - {"self", "args", "kwargs"}


@torch.compiler.assume_constant_result
def _is_of_attention(implementation: str, name: str) -> bool:
    """Whether an attention function takes an argument of that name."""
    if implementation not in ALL_ATTENTION_FUNCTIONS:
        return False
    function = ALL_ATTENTION_FUNCTIONS[implementation]
    parameters = inspect.signature(function).parameters
    taken = set(parameters) - _OF_ATTENTION_LAYER
    if not function.__module__.startswith("transformers."):
        # A server's own function may read anything from its `**kwargs`, except a misspelled argument of the model.
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        return name in taken or (takes_any and not get_close_matches(name, _OF_MODELS, n=1, cutoff=0.8))
    if "flash" in implementation:  # passes its `**kwargs` on
        taken |= set(inspect.signature(_flash_attention_forward).parameters) - _OF_ATTENTION_LAYER
    elif "flex" in implementation:  # reads it from its `**kwargs`
        taken.add("kernel_options")
    return name in taken


def _explain_unknown(model: str, name: str, value: Any, known: frozenset[str]) -> str:
    if isinstance(value, Cache):
        return f"{model} takes no cache as `{name}`. Give it as `{CACHE_NAME}`."
    message = f"{model} takes no argument `{name}` (got {type(value).__name__})"
    if name == "token_type_ids":
        return (
            f"{message}: it has no segments. Call the tokenizer with return_token_type_ids=False, or remove the name "
            "from `tokenizer.model_input_names`."
        )
    nearest = get_close_matches(name, [*known, *_COMMON_ARGUMENTS], n=1)
    return f"{message}: did you mean `{nearest[0]}`?" if nearest else f"{message}. Leave it out."
