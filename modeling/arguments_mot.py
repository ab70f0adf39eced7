"""What the forward of a Mixture-of-Tokens model takes: a cache by either of its names, and nothing unknown."""

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from functools import wraps
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.utils import TransformersKwargs

# What attention, masks, outputs and `generate` of this transformers call the cache: "cache" from 5.24 on.
CACHE_NAME = "cache" if "cache" in inspect.signature(Qwen3Attention.forward).parameters else "past_key_values"
_CACHE_NAMES = {"past_key_values", "cache"}

# What every forward takes beside its own arguments: what all models of transformers take, what continuous batching
# passes on, what the losses take, which share a head's arguments with the backbone, and what decorators take.
_COMMON_ARGUMENTS = {*TransformersKwargs.__annotations__, *PagedAttentionArgs.__annotations__} - _CACHE_NAMES
_COMMON_ARGUMENTS |= {"num_items_in_batch", "ignore_index", "shift_labels"}
_COMMON_ARGUMENTS |= {"return_dict", "debug_io", "debug_io_dir", "prune_layers"}

# Arguments of the models themselves that a misspelled one may mean.
_OF_MODELS = _COMMON_ARGUMENTS | _CACHE_NAMES | {"mixing", "token_mask", "inputs_embeds", "labels"}

# Arguments that the attention layer gives its attention function.
_OF_ATTENTION_LAYER = {*inspect.signature(Qwen3Attention.forward).parameters, *_CACHE_NAMES}
_OF_ATTENTION_LAYER |= {"module", "query", "key", "value", "query_states", "key_states", "value_states"}
_OF_ATTENTION_LAYER |= {"dropout", "scaling", "sliding_window"}


def known_arguments_only(
    forward: Callable[..., Any], backbone_forward: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """Make a forward refuse what nobody takes: `**kwargs` would swallow it, and the model run as if it were not there.

    What is `None` says nothing, so it may have any name.

    Args:
        forward (`Callable`): The forward of a model.
        backbone_forward (`Callable`, *optional*): That of its backbone, if it hands on to it what it does not name.

    Returns:
        `Callable`: The same, which raises a `ValueError` before anything is computed.
    """
    known = _names(forward) | (_names(backbone_forward) if backbone_forward else frozenset())
    if known & _CACHE_NAMES:
        known |= _CACHE_NAMES

    @wraps(forward)
    def checked(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
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
    """The cache of a call, which may come under its name up to transformers 5.23 or its name from 5.24 on.

    Args:
        past_key_values (`Cache`, *optional*): The cache under the one name.
        cache (`Cache` or `PagedAttentionCache`, *optional*): The cache under the other name.
        kwargs (`dict[str, Any]`): The call's further arguments. The paged cache of continuous batching, which
            attention takes as `cache` in every version, is put back there where that is not the cache's name.

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
        raise ValueError("`cache` and `past_key_values` are two names of one argument: give one of them.")
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
        # A server's own may read anything from its `**kwargs`, but for what is nearly an argument of the model.
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        return name in taken or (takes_any and not get_close_matches(name, _OF_MODELS, n=1, cutoff=0.8))
    if "flash" in implementation:  # hands on what it is given
        taken |= set(inspect.signature(_flash_attention_forward).parameters) - _OF_ATTENTION_LAYER
    elif "flex" in implementation:  # reads it from there
        taken.add("kernel_options")
    return name in taken


def _explain_unknown(model: str, name: str, value: Any, known: frozenset[str]) -> str:
    if isinstance(value, Cache):
        return f"{model} takes no cache as `{name}`. Give it as `{CACHE_NAME}`."
    message = f"{model} takes no argument `{name}` (got {type(value).__name__})"
    if name == "token_type_ids":
        return (
            f"{message}: it has no segments. Call the tokenizer with return_token_type_ids=False, or take the name "
            "out of `tokenizer.model_input_names`."
        )
    nearest = get_close_matches(name, [*known, *_COMMON_ARGUMENTS], n=1)
    return f"{message}: did you mean `{nearest[0]}`?" if nearest else f"{message}. Leave it out."
