"""Masks: which tokens a token attends to, and which are padding.

Axes: B rows, T columns of a call, past columns in the cache, D model width.
"""

from typing import Any, TypeGuard

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import (
    create_causal_mask,
    find_packed_sequence_indices,
    packed_sequence_mask_function,
)
from transformers.utils.import_utils import is_tracing

from .arguments_mot import CACHE_NAME
from .configuration_mot import MoTConfig


def make_attention_mask(
    config: MoTConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache | None,
) -> Any:
    """The mask of the attention implementation: causal, or bidirectional if `config.is_causal` is false.

    During a call with an `is_causal` of its own, the configuration has that one.

    Without a cache and a mask, a row is taken for several sequences where its positions do not rise by 1, and tokens
    attend to those of their own sequence.

    Raises:
        ValueError: A bidirectional call continues a cache.
    """
    # The caches of continuous batching are none of these, and causal.
    num_cached = cache.get_seq_length() if isinstance(cache, Cache) and not config.is_causal else 0
    if isinstance(num_cached, int) and num_cached:
        raise ValueError(
            f"The cache holds {num_cached} columns, and with `is_causal=False` their tokens would have to see the new "
            "ones too: give all columns in one call."
        )
    packed = None
    if not config.is_causal and attention_mask is None and cache is None and position_ids is not None:
        # For causal masks transformers does it.
        packed = find_packed_sequence_indices(position_ids.expand(inputs_embeds.shape[0], -1))  # [B, T]
    return create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        position_ids=position_ids,
        and_mask_function=None if packed is None else packed_sequence_mask_function(packed),
        **{CACHE_NAME: cache},
    )


def find_padding(inputs_embeds: Tensor, token_mask: Tensor | None) -> Tensor | None:
    """The mask `[B, T]` of this call's tokens, or `None` if there is known to be no padding."""
    if token_mask is None:
        return None
    token_mask = token_mask.to(inputs_embeds.device, torch.bool)
    # One look at the data for the whole model, as transformers takes it for attention, spares every layer the masked
    # path. A graph cannot look.
    return None if not is_tracing(token_mask) and token_mask.all() else token_mask


def is_of_tokens(attention_mask: Any) -> TypeGuard[Tensor]:
    """Whether a mask says of every token whether it is padding; flex attention has masks that are no tensors."""
    return isinstance(attention_mask, Tensor) and attention_mask.ndim == 2


def count_cached(cache: Any, attention_mask: Any) -> int | Tensor:
    """The number of columns in a cache: a tensor if the cache is static and no mask of tokens is compared with it."""
    num_cached = cache.get_seq_length() if isinstance(cache, Cache) else 0
    if not isinstance(num_cached, Tensor):
        return num_cached
    if is_of_tokens(attention_mask) and not is_tracing(num_cached):
        return int(num_cached)
    return num_cached.clone()  # the cache counts in place


def fit_masks(
    attention_mask: Tensor | None, token_mask: Tensor | None, num_columns: int, num_cached: int | Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Cut columns after this call's tokens off an attention mask, and take the tokens' own mask from it.

    Args:
        attention_mask (`torch.Tensor`, *optional*): The mask `[B, past + T]`, or longer, as one that is made once for
            a static cache. Other masks stay as they are.
        token_mask (`torch.Tensor` of shape `[B, T]`, *optional*): The tokens' own mask, if the caller gives it.
        num_columns (`int`): Number T of this call's columns.
        num_cached (`int` or `torch.Tensor`): Number of columns before them. Without its value, as in a graph, nothing
            is cut off or refused: attention cuts by itself.

    Returns:
        `tuple(torch.Tensor, torch.Tensor)`: The attention mask and the tokens' own, each `None` if there is none.

    Raises:
        ValueError: A mask of tokens is too short.
    """
    if not is_of_tokens(attention_mask):
        return attention_mask, token_mask
    if not isinstance(num_cached, Tensor):
        if attention_mask.shape[1] < num_cached + num_columns:
            raise ValueError(
                f"`attention_mask` has {attention_mask.shape[1]} columns, and there are {num_cached} cached and "
                f"{num_columns} new tokens in a row. Give it a column for each of these {num_cached + num_columns}."
            )
        attention_mask = attention_mask[:, : num_cached + num_columns]
    if token_mask is None:
        token_mask = select_columns(attention_mask, num_columns, num_cached)
    return attention_mask, token_mask


def select_columns(of_mask: Tensor, num_columns: int, num_cached: int | Tensor) -> Tensor:
    """The columns `[B, T]` of this call's tokens, out of a mask's `[B, past + T]` or more."""
    if isinstance(num_cached, Tensor):  # a slice would have to know its value
        return of_mask[:, torch.arange(num_columns, device=of_mask.device) + num_cached.to(of_mask.device)]
    return of_mask[:, num_cached : num_cached + num_columns]


def refuse_flattened_rows(
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past_key_values: object | None,
    kwargs: dict[str, object],
) -> None:
    """Raise if the batch is one row of several sequences: there are no other examples to mix with."""
    if inputs_embeds.shape[0] > 1:
        return
    flattened = any(kwargs.get(name) is not None for name in ("cu_seq_lens_q", "cu_seq_lens_k"))
    # As in transformers, positions count only without a cache or mask: beside a mask, positions that do not rise by 1
    # may be padding's.
    if not flattened and attention_mask is None and past_key_values is None and position_ids is not None:
        flattened = not is_tracing(position_ids) and bool((position_ids.diff(dim=-1) != 1).any())
    if flattened:
        raise ValueError(
            "mixing='cross_example' mixes different rows of the batch, and this batch is one row that holds several "
            "sequences (flattened, packed or continuously batched). Put each sequence into a row of its own, or set "
            "mixing='per_sequence' or 'moe'."
        )
