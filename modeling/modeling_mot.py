"""Mixture-of-Tokens models: experts, layers and the backbone.

Axes: B rows, T columns, G group size, S = B * T tokens, N groups of tokens, E experts, K experts per token, D model
width, F expert width.
"""

import os
from functools import partial
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.moe import batched_mm_experts_forward
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP, Qwen3RMSNorm, Qwen3RotaryEmbedding
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .arguments_mot import CACHE_NAME, known_arguments_only, merge_caches
from .companions_mot import (
    GroupSums,
    MoTCompanions,
    RunningStatistics,
    average_groups,
    form_groups,
    update_companions,
)
from .configuration_mot import MoTConfig
from .experts_mot import Mixed, mix_and_run, run_rows
from .masks_mot import count_cached, find_padding, fit_masks, make_attention_mask, refuse_flattened_rows
from .mixing_mot import (
    MIXING_MODES,
    MixingContext,
    MoTRouter,
    find_position_buckets,
    gather_from_rows,
    mix_across_examples,
    mix_with_expected_companions,
    route_tokens,
)
from .parallel_mot import average_companions, call_experts, check_sharding, name_own_style
from .products_mot import fit_grouped_mm
from .selected_mot import OwnMixtures, can_run_selected, copy_and_run, mix_and_run_selected

logger = logging.get_logger(__name__)


class MoTExperts(Qwen3MoeExperts):
    """E SwiGLU experts as 3-D weights: transformers' experts interface runs selected ones, [`mix_and_run`] all."""

    config: MoTConfig
    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

    # Set by a method of expert parallelism that takes every expert's rows as a batch of their own.
    takes_batches = False

    # Callers never use the weights themselves: PEFT and wrappers of modules replace or wrap this forward.

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
        *,
        mixing_weights: Tensor | None = None,
        mean_input: Tensor | None = None,
        counts: Tensor | None = None,
        own: OwnMixtures | None = None,
    ) -> Tensor | Mixed:
        """Run experts.

        Selected experts run on tokens `[S, D]`, with `own` on mixtures of them; all experts run with `mixing_weights`
        on groups `[A, H, T, D]`, and without anything else each on rows of its own `[E, N, D]`.
        """
        if mixing_weights is not None:
            weights = (mixing_weights, self.gate_up_proj, self.down_proj)
            return mix_and_run(hidden_states, *weights, self.act_fn, mean_input, counts)
        if own is not None:
            return self._run_own_mixtures(hidden_states, top_k_index, top_k_weights, own)
        if top_k_index is None:
            return run_rows(hidden_states, self.gate_up_proj, self.down_proj, self.act_fn)
        return self._run_routed(hidden_states, top_k_index, top_k_weights)

    def _run_own_mixtures(self, tokens: Tensor, index: Tensor, weights: Tensor, own: OwnMixtures) -> Tensor:
        parameters = (self.gate_up_proj, self.down_proj)
        # Other implementations are taken at their word.
        as_one = self.config._experts_implementation == "grouped_mm"
        as_one = as_one and (tokens.device.type == "cpu" or self._fits_grouped_mm())
        if as_one and can_run_selected(tokens, own, weights, *parameters, activation=self.act_fn):
            return mix_and_run_selected(tokens, index, weights, own, *parameters, self.act_fn)
        return copy_and_run(self._run_routed, tokens, index, weights, own)

    def _run_routed(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if self.config._experts_implementation != "grouped_mm" or self._fits_grouped_mm():
            return super().forward(hidden_states, top_k_index, top_k_weights)
        if is_tracing(hidden_states):  # the loop over experts depends on the data, which a graph cannot express
            return batched_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
        logger.warning_once(
            f"`hidden_size` ({self.config.hidden_size}) and `moe_intermediate_size` "
            f"({self.config.moe_intermediate_size}) are not both multiples of 16 bytes in {self.down_proj.dtype}, so "
            "modes per_sequence and moe run one expert after the other. Multiples of 8 are faster."
        )
        return Qwen3MoeExperts.forward.__wrapped__(self, hidden_states, top_k_index, top_k_weights)

    def _fits_grouped_mm(self) -> bool:
        """Whether the rows of both weights are multiples of 16 bytes."""
        return fit_grouped_mm(self.gate_up_proj, self.down_proj)


def _reaches_own_forward(experts: nn.Module) -> bool:
    """Whether a call of the experts, with all its arguments, reaches [`MoTExperts.forward`]."""
    while isinstance(wrapped := getattr(experts, "base_layer", None), nn.Module):  # PEFT's wrappers pass arguments on
        experts = wrapped
    return isinstance(experts, MoTExperts) and "forward" not in vars(experts)


def _are_own(experts: nn.Module) -> bool:
    """Whether these are ours, maybe within a wrapper."""
    return isinstance(experts, MoTExperts) or any(isinstance(module, MoTExperts) for module in experts.modules())


def _refuse_experts_of_servers(mode: str, activation: str) -> None:
    """Refuse what experts cannot do that vLLM and SGLang put in the place of ours: they run selected ones, by SiLU."""
    if mode == "cross_example":
        raise ValueError(
            "mixing='cross_example' mixes different rows of the batch, and a server puts all requests into one. Set "
            "`inference_mixing` to 'per_sequence' or 'moe' in the model's configuration."
        )
    if activation not in ("silu", "swish"):
        raise ValueError(
            f"vLLM and SGLang run experts with SiLU, and those of this model have `hidden_act={activation!r}`: its "
            "answers would be wrong. Serve it by `transformers serve`."
        )


class MoTSparseBlock(nn.Module):
    """A MoT layer: a controller, experts and companions, combined in one of the three mixing modes."""

    def __init__(self, config: MoTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.gate = MoTRouter(config)
        self.experts = MoTExperts(config)
        self.companions = MoTCompanions(config)

    def forward(self, hidden_states: Tensor, context: MixingContext) -> Tensor:
        """Map tokens `[B, T, D]` to outputs of the same shape."""
        if not _are_own(self.experts):
            _refuse_experts_of_servers(context.mode, self.config.hidden_act)
        logits = self.gate(hidden_states)  # [S, E]
        if context.mode == "cross_example":
            return self._mix_across_examples(hidden_states, logits, context)
        tokens, config = hidden_states.flatten(0, 1), self.config  # [S, D]
        if context.mode == "per_sequence":
            output = self._mix_with_expected_companions(tokens, logits, context)
            if context.sums is not None:
                context.sums[self.layer_idx] = self._gather_from_rows(hidden_states, logits, context)
        else:
            output = route_tokens(tokens, logits, config.num_experts_per_tok, config.norm_topk_prob, self.experts)
        return output.view_as(hidden_states)

    def _mix_with_expected_companions(self, tokens: Tensor, logits: Tensor, context: MixingContext) -> Tensor:
        # Parallelism and servers replace the experts, or their forward, by what knows the routed signature alone.
        knows_mixtures = _reaches_own_forward(self.experts)
        return mix_with_expected_companions(
            tokens,
            logits,
            context.buckets.to(tokens.device).flatten(),  # [S]
            self.find_companions(context),
            self.config.group_size,
            self.config.num_experts_per_tok,
            self.experts if knows_mixtures else partial(copy_and_run, self.experts),
            self.config.norm_mixing_weights,
        )

    def _mix_across_examples(self, hidden_states: Tensor, logits: Tensor, context: MixingContext) -> Tensor:
        output, sums = mix_across_examples(
            hidden_states,
            # The router's output is flat, as transformers records it and its load-balancing loss expects it.
            logits.unflatten(0, hidden_states.shape[:2]),  # [B, T, E]
            context.get_groups(self.config.group_size, hidden_states.device),
            self.find_companions(context),
            self.config.group_size,
            call_experts(self.experts),
            gathers=context.sums is not None,
            norm_mixing_weights=self.config.norm_mixing_weights,
        )
        if context.sums is not None and sums is not None:
            context.sums[self.layer_idx] = sums
        return output

    def _gather_from_rows(self, hidden_states: Tensor, logits: Tensor, context: MixingContext) -> GroupSums:
        return gather_from_rows(
            hidden_states,
            logits.unflatten(0, hidden_states.shape[:2]),  # [B, T, E]
            context.get_groups(self.config.group_size, hidden_states.device),
            self.find_companions(context),
            self.config.group_size,
            # With normalised weights, experts that are not run contribute nothing.
            None if self.config.norm_mixing_weights else self.experts,
        )

    def find_companions(self, context: MixingContext) -> RunningStatistics:
        """The expected companions that a pass uses."""
        companions = context.companions.get(self.layer_idx)
        return self.companions.expected() if companions is None else companions


class MoTDecoderLayer(GradientCheckpointingLayer):
    """One pre-norm block of attention and a feed-forward layer, dense or MoT."""

    def __init__(self, config: MoTConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = Qwen3Attention(config, layer_idx)
        # Servers look here. transformers passes the configuration's value to attention functions.
        self.self_attn.is_causal = config.is_causal
        self.is_sparse = cast(list[str], config.mlp_layer_types)[layer_idx] == "sparse"
        self.mlp = MoTSparseBlock(config, layer_idx) if self.is_sparse else Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, hidden_states: Tensor, mixing_context: MixingContext, **kwargs: Unpack[TransformersKwargs]
    ) -> Tensor:
        """Map hidden states `[B, T, D]` to those after the block; further arguments are passed to attention."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        return hidden_states + (self.mlp(normed, mixing_context) if self.is_sparse else self.mlp(normed))


class MoTPreTrainedModel(PreTrainedModel):
    """Base of all MoT models: loading, initialisation, and the choice of the mixing mode."""

    config: MoTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MoTDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]  # the name before transformers 5.24, and since
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "router_logits": OutputRecorder(MoTRouter, index=0),
        "hidden_states": MoTDecoderLayer,
        "attentions": Qwen3Attention,
    }

    def __init__(self, config: MoTConfig) -> None:
        config.validate()  # or an invalid field set after its creation would only fail the first save
        super().__init__(config)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for the experts decorator in the source of this file; ours is inherited by MoTExperts.
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, MoTExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, MoTRouter):
            init.normal_(module.weight, mean=0.0, std=self.config.router_initializer_range)
        elif isinstance(module, MoTCompanions):
            # Loading leaves buffers that a checkpoint lacks as uninitialised memory.
            for buffer in module.buffers():
                init.zeros_(buffer)

    @classmethod
    def maybe_distribute_model(cls, model: nn.Module, distributed_config: Any, *args: Any, **kwargs: Any) -> nn.Module:
        """Spread the model over processes, as transformers does it when it loads, unless the numbers do not fit it."""
        if distributed_config is not None:
            check_sharding(cast(MoTConfig, model.config), distributed_config)
            cast(Self, model)._tp_plan = name_own_style(cast(Self, model)._tp_plan)
        return super().maybe_distribute_model(model, distributed_config, *args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save the model. Processes that it was spread over as it was loaded average their statistics first.

        Args:
            save_directory (`str` or `os.PathLike`): Folder, created if it does not exist.
            args, kwargs: Passed on to transformers' `save_pretrained`.
        """
        distributed_config = getattr(self.config, "distributed_config", None)
        if getattr(distributed_config, "dp_size", getattr(distributed_config, "fsdp_size", None) or 1) > 1:
            average_companions(module for module in self.modules() if isinstance(module, MoTCompanions))
        super().save_pretrained(save_directory, *args, **kwargs)

    def set_mixing(self, mixing: str | None = None, *, inference_mixing: str | None = None) -> Self:
        """Change the mixing mode of training, of inference, or of both, in the model's configuration.

        Args:
            mixing (`str`, *optional*):
                Mode in training: `"cross_example"`, `"per_sequence"` or `"moe"`. Unchanged if `None`.
            inference_mixing (`str`, *optional*):
                Mode in evaluation and generation. Unchanged if `None`.

        Returns:
            The model itself.

        Raises:
            ValueError: A mode is unknown; nothing is changed.
        """
        changes = {"mixing": mixing, "inference_mixing": inference_mixing}
        changes = {name: _check_mode(name, mode) for name, mode in changes.items() if mode is not None}
        for name, mode in changes.items():
            setattr(self.config, name, mode)
        return self

    def _resolve_mixing(self, mixing: str | None) -> str:
        """The mode of a forward pass: the call's, else the configuration's for training or inference."""
        if mixing is not None:
            return _check_mode("mixing", mixing)
        return self.config.mixing if self.training else cast(str, self.config.inference_mixing)


class MoTModel(MoTPreTrainedModel):
    """The MoT backbone: embeddings, blocks and the final norm, causal or bidirectional by `config.is_causal`."""

    def __init__(self, config: MoTConfig) -> None:
        super().__init__(config)
        # `nn.Embedding` refuses an id beyond the vocabulary, and takes -1 as its last row.
        self.padding_idx = config.pad_token_id if config.pad_token_id in range(config.vocab_size) else None
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(MoTDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.is_calibrated = False  # while it is, passes in mode per_sequence gather statistics without training
        self._companions_were_checked = False
        self.post_init()

    @known_arguments_only
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        mixing: str | None = None,
        token_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],  # pyright: ignore[reportGeneralTypeIssues]  # overlaps, as in transformers
    ) -> MoeModelOutputWithPast:
        r"""Run the backbone.

        Args:
            input_ids (`torch.Tensor` of shape `[B, T]`, *optional*): Token ids; or give `inputs_embeds`.
            attention_mask (`torch.Tensor`, *optional*): 1 for tokens and 0 for padding, over all columns seen so far
                `[B, past + T]`; columns after them, as of a mask made once for a static cache, do not count. Or a 4-D
                mask, which only attention uses.
            position_ids (`torch.Tensor` of shape `[B, T]`, *optional*): Positions. Defaults to the columns' numbers.
                Without a cache and a mask, a row is taken for several sequences where they do not rise by 1.
            past_key_values (`Cache`, *optional*): Keys and values of earlier columns.
            inputs_embeds (`torch.Tensor` of shape `[B, T, D]`, *optional*): Embeddings in place of `input_ids`.
            use_cache (`bool`, *optional*): Whether to return a cache. Defaults to `config.use_cache`.
            mixing (`str`, *optional*): Mixing mode of this call. Defaults to `config.mixing` in training and
                `config.inference_mixing` in evaluation.
            token_mask (`torch.Tensor` of shape `[B, T]`, *optional*): Which of this call's tokens are not padding, for
                mode `cross_example`. Defaults to their columns of a 2-D `attention_mask`, else to all.
            cache (`Cache`, *optional*): The name of `past_key_values` in transformers 5.24 and later.
            kwargs: Passed on to attention; also `output_hidden_states`, `output_attentions`, `output_router_logits`.

        Returns:
            `MoeModelOutputWithPast`: `last_hidden_state` `[B, T, D]`, the cache, and what was asked for; router logits
            are `[S, E]` for each MoT layer.

        Raises:
            ValueError: An argument is not known, `mixing` is unknown, both or neither of `input_ids` and
                `inputs_embeds` are given, a 2-D `attention_mask` lacks columns, or mode `cross_example` is given
                several sequences in one row, or a bidirectional call continues a cache.
        """
        cache = merge_caches(past_key_values, cache, kwargs)
        mode = self._resolve_mixing(mixing)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = cast(Tensor, self.embed_tokens(input_ids))
        num_columns, num_cached = inputs_embeds.shape[1], count_cached(cache, attention_mask)
        attention_mask, token_mask = fit_masks(attention_mask, token_mask, num_columns, num_cached)
        buckets = find_position_buckets(inputs_embeds, position_ids, attention_mask, num_cached, token_mask)
        context = MixingContext(mode, buckets)
        if mode == "cross_example":
            refuse_flattened_rows(inputs_embeds, attention_mask, position_ids, cache, kwargs)
        elif mode == "per_sequence" and not (is_tracing(inputs_embeds) or self._companions_were_checked):
            self._check_companions()
        self._form_groups(context, inputs_embeds, token_mask)

        if self.training and torch.is_grad_enabled():
            context.companions = self._keep_companions(context)

        # A new cache is made after it: beside one, nobody looks for sequences that are packed into a row.
        mask = make_attention_mask(self.config, inputs_embeds, attention_mask, position_ids, cache)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = torch.arange(num_columns, device=inputs_embeds.device) + num_cached
            position_ids = position_ids.unsqueeze(0)  # [1, T]

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers[: self.config.num_hidden_layers]:  # fewer for an assistant that exits early
            # By position: checkpointing differentiates, and the recorder of hidden states reads, the first argument.
            hidden_states = layer(
                hidden_states,
                mixing_context=context,
                attention_mask=mask,
                position_ids=position_ids,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **{CACHE_NAME: cache},
                **kwargs,
            )
        # Here rather than in each layer, whose forward runs again in the backward pass under gradient checkpointing.
        if self.training:
            self._update_companions(context)
        cache = cache if use_cache else None
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE_NAME: cache})

    def _companions(self) -> dict[int, MoTCompanions]:
        # By attributes rather than types, because wrappers of modules (FSDP, checkpointing, PEFT) pass them on.
        sparse = {index: layer for index, layer in enumerate(self.layers) if getattr(layer, "is_sparse", False)}
        return {index: cast(Any, layer).mlp.companions for index, layer in sparse.items()}

    def _keep_companions(self, context: MixingContext) -> dict[int, RunningStatistics]:
        """Copies of the expected companions if this pass uses them."""
        # Full groups do not.
        needed = context.mode == "per_sequence" or (context.groups is not None and context.groups.present is not None)
        return {index: companions.snapshot() for index, companions in self._companions().items()} if needed else {}

    def _form_groups(self, context: MixingContext, inputs_embeds: Tensor, token_mask: Tensor | None) -> None:
        """Form the groups that a pass mixes, or whose statistics it gathers."""
        # In mode per_sequence not without gradients: a trainer may let its model generate, or score answers, in
        # training mode.
        is_live = self.training and torch.is_grad_enabled() and self.config.live_companions
        gathers = context.mode == "per_sequence" and (is_live or self.is_calibrated)
        if gathers or context.mode == "cross_example":
            context.token_mask = find_padding(inputs_embeds, token_mask)
            context.groups = form_groups(context.buckets, context.token_mask, self.config.group_size)
        else:
            context.sums = None
            context.masks = (inputs_embeds, token_mask) if self.training else None

    def _check_companions(self) -> None:
        """Warn once per model if the statistics that stand in for other rows were never gathered."""
        self._companions_were_checked = True
        if self.config.mixing == "per_sequence":  # training gathers them, or goes without
            return
        counters = [companions.num_batches_tracked for companions in self._companions().values()]
        if any(not counter.is_meta and counter == 0 for counter in counters):
            logger.warning(
                "Mode per_sequence uses statistics of the typical group, and this model has none: it was not trained "
                "in mode cross_example. Its results will be poor until `mot_hf.calibration.calibrate(model, batches)` "
                "or training gathers them."
            )

    def _update_companions(self, context: MixingContext) -> None:
        """Update the running statistics by this forward's, once, even if the backward pass recomputes layers."""
        sums, context.sums = context.sums or {}, None
        companions = self._companions()
        # Layers of one device at a time: they are updated by common kernels.
        for device in dict.fromkeys(layer_sums.sums.device for layer_sums in sums.values()):
            indices = [index for index, layer_sums in sums.items() if layer_sums.sums.device == device]
            groups = context.get_groups(self.config.group_size, device)
            batch = average_groups([sums[index] for index in indices], groups, self.config.group_size)
            update_companions([companions[index] for index in indices], batch, groups.num_tokens)


def _check_mode(name: str, mode: str) -> str:
    if mode not in MIXING_MODES:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, MIXING_MODES))}, got {mode!r}.")
    return mode


__all__ = ["MoTModel", "MoTPreTrainedModel"]
