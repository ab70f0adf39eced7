"""Mixture-of-Tokens models: experts, layers, backbone and heads.

Axes: B rows, T columns, G group size, S = B * T tokens, N groups of tokens, E experts, K experts per token, D model
width, F expert width.
"""

import copy
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import MaskedLMOutput, MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP, Qwen3RMSNorm, Qwen3RotaryEmbedding
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, load_balancing_loss_func
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_mot import MoTConfig
from .mixing_mot import (
    MIXING_MODES,
    MixingContext,
    MoTCompanions,
    MoTRouter,
    find_padding,
    mix_across_examples,
    mix_with_expected_companions,
    refuse_flattened_rows,
    route_tokens,
)

logger = logging.get_logger(__name__)


class MoTExperts(Qwen3MoeExperts):
    """E SwiGLU experts as 3-D weights: selected ones through transformers' experts interface, or all on a slab."""

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """Run selected experts on tokens `[S, D]`, or without `top_k_index` every expert on its rows of a slab."""
        if top_k_index is not None:
            return super().forward(hidden_states, top_k_index, top_k_weights)
        hidden = self._apply_gate(torch.bmm(hidden_states, self.gate_up_proj.transpose(1, 2)))  # [E, N, F]
        return torch.bmm(hidden, self.down_proj.transpose(1, 2))  # [E, N, D]


class MoTSparseBlock(nn.Module):
    """A MoT layer: the controller, the experts and the companions, joined by one of the three mixing modes."""

    def __init__(self, config: MoTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.gate = MoTRouter(config)
        self.experts = MoTExperts(config)
        self.companions = MoTCompanions(config)

    def forward(self, hidden_states: Tensor, context: MixingContext) -> Tensor:
        """Map tokens `[B, T, D]` to outputs of the same shape."""
        logits = self.gate(hidden_states)  # [S, E]
        if context.mode == "cross_example":
            return self._mix_across_examples(hidden_states, logits, context)
        tokens, config = hidden_states.flatten(0, 1), self.config  # [S, D]
        if context.mode == "per_sequence":
            companions = self.companions.expected()
            output = mix_with_expected_companions(
                tokens, logits, companions, config.group_size, config.num_experts_per_tok, self.experts
            )
        else:
            output = route_tokens(tokens, logits, config.num_experts_per_tok, config.norm_topk_prob, self.experts)
        return output.view_as(hidden_states)

    def _mix_across_examples(self, hidden_states: Tensor, logits: Tensor, context: MixingContext) -> Tensor:
        token_mask = None if context.token_mask is None else context.token_mask.to(hidden_states.device)
        companions = context.companions.setdefault(self.layer_idx, self.companions.expected())
        logits = logits.unflatten(0, hidden_states.shape[:2])  # [B, T, E]
        output, context.statistics[self.layer_idx] = mix_across_examples(
            hidden_states, logits, token_mask, companions, self.config.group_size, self.experts
        )
        return output


class MoTDecoderLayer(GradientCheckpointingLayer):
    """One pre-norm block of attention and a feed-forward layer, dense or MoT."""

    def __init__(self, config: MoTConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = Qwen3Attention(config, layer_idx)
        self.is_sparse = config.mlp_layer_types[layer_idx] == "sparse"
        self.mlp = MoTSparseBlock(config, layer_idx) if self.is_sparse else Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, hidden_states: Tensor, mixing_context: MixingContext, **kwargs: Unpack[TransformersKwargs]
    ) -> Tensor:
        """Map hidden states `[B, T, D]` to those after the block; the other arguments are the attention's."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        return hidden_states + (self.mlp(normed, mixing_context) if self.is_sparse else self.mlp(normed))


class MoTPreTrainedModel(PreTrainedModel):
    """What all MoT models share: loading, initialisation, and the choice of the mixing mode."""

    config: MoTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MoTDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
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

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for the experts decorator in this file; ours comes with the parent class of MoTExperts.
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, MoTExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, MoTRouter):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, MoTCompanions):
            for buffer in module.buffers():
                init.zeros_(buffer)

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
        return self.config.mixing if self.training else self.config.inference_mixing


class MoTModel(MoTPreTrainedModel):
    """The MoT backbone: embeddings, blocks and the final norm, causal or bidirectional by `config.is_causal`."""

    def __init__(self, config: MoTConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(MoTDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self._companions_were_checked = False
        self.post_init()

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
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast:
        r"""Run the backbone.

        Args:
            input_ids (`torch.Tensor` of shape `[B, T]`, *optional*): Token ids; or give `inputs_embeds`.
            attention_mask (`torch.Tensor`, *optional*): 1 for tokens and 0 for padding, over all columns seen so far
                `[B, past + T]`; or a 4-D mask for attention alone.
            position_ids (`torch.Tensor` of shape `[B, T]`, *optional*): Positions; by default those of the columns.
            past_key_values (`Cache`, *optional*): Keys and values of earlier columns.
            inputs_embeds (`torch.Tensor` of shape `[B, T, D]`, *optional*): Embeddings in place of `input_ids`.
            use_cache (`bool`, *optional*): Whether to return a cache; by default `config.use_cache`.
            mixing (`str`, *optional*): Mixing mode of this call. Defaults to `config.mixing` in training and
                `config.inference_mixing` in evaluation.
            token_mask (`torch.Tensor` of shape `[B, T]`, *optional*): Which of this call's tokens are not padding, for
                mode `cross_example`. Defaults to the last T columns of a 2-D `attention_mask`, else to all.
            kwargs: Passed on to attention; also `output_hidden_states`, `output_attentions`, `output_router_logits`.

        Returns:
            `MoeModelOutputWithPast`: `last_hidden_state` `[B, T, D]`, the cache, and what was asked for; router logits
            are `[S, E]` for each MoT layer.

        Raises:
            ValueError: `mixing` is unknown, both or neither of `input_ids` and `inputs_embeds` are given, or mode
                `cross_example` is given several sequences in one row.
        """
        context = MixingContext(self._resolve_mixing(mixing))
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if context.mode == "cross_example":
            refuse_flattened_rows(inputs_embeds, attention_mask, position_ids, past_key_values, kwargs)
            context.token_mask = find_padding(inputs_embeds, attention_mask, token_mask)
        elif context.mode == "per_sequence" and not (self._companions_were_checked or is_tracing(inputs_embeds)):
            self._check_companions()

        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past_seen_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_seen_tokens
            position_ids = position_ids.unsqueeze(0)  # [1, T]
        # Bidirectional where `is_causal` of the call or the configuration says so.
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                mixing_context=context,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        if self.training:
            self._absorb(context)
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _check_companions(self) -> None:
        """Say so, once a model, if the statistics that stand in for other rows were never gathered."""
        self._companions_were_checked = True
        companions = [module for module in self.modules() if isinstance(module, MoTCompanions)]
        if any(module.num_batches_tracked == 0 for module in companions):
            logger.warning(
                "Mode per_sequence uses statistics of the typical group, and this model has none: it was not trained "
                "in mode cross_example. Its results will be poor until `mot_hf.calibration.calibrate(model, batches)` "
                "or training gathers them."
            )

    def _absorb(self, context: MixingContext) -> None:
        """Add this forward's statistics to the running ones, once, whatever is recomputed in the backward pass."""
        for layer_idx, statistics in context.statistics.items():
            self.layers[layer_idx].mlp.companions.absorb(statistics)


class MoTLanguageModel(MoTPreTrainedModel):
    """What the two language models share: the projection to the vocabulary, and the losses."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MoTConfig) -> None:
        super().__init__(config)
        self.model = MoTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _predict(
        self,
        inputs: dict[str, Any],
        labels: Tensor | None,
        output_router_logits: bool | None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeCausalLMOutputWithPast:
        """Run the backbone on its `inputs`, project to the vocabulary, and add up the losses."""
        config = self.config
        if output_router_logits is None:
            output_router_logits = config.output_router_logits
        outputs = self.model(**inputs, output_router_logits=output_router_logits, **kwargs)
        kept_columns = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept_columns, :])
        loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size, **kwargs)

        aux_loss = None
        # The other modes balance by themselves.
        if outputs.router_logits and self._resolve_mixing(inputs["mixing"]) == "moe":
            token_mask = find_padding(outputs.last_hidden_state, inputs["attention_mask"], inputs["token_mask"])
            aux_loss = load_balancing_loss_func(
                outputs.router_logits, config.num_experts, config.num_experts_per_tok, token_mask
            )
            if loss is not None:
                loss = loss + config.router_aux_loss_coef * aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


class MoTForCausalLM(MoTLanguageModel, GenerationMixin):
    """A causal MoT language model.

    Raises:
        ValueError: The configuration has `is_causal=False`, with which a token would see its own future.
    """

    def __init__(self, config: MoTConfig) -> None:
        if not config.is_causal:
            raise ValueError(
                "`MoTForCausalLM` needs `is_causal=True`, got False: the configuration is a masked language model's. "
                "Load it as `MoTForMaskedLM`, or pass `is_causal=True` to train it further as a causal model."
            )
        super().__init__(config)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        mixing: str | None = None,
        token_mask: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeCausalLMOutputWithPast:
        r"""Predict the next token at every column; arguments as in [`MoTModel.forward`], and these.

        Args:
            labels (`torch.Tensor` of shape `[B, T]`, *optional*): The tokens of `input_ids` themselves (the shift is
                done here), -100 where no loss is wanted.
            output_router_logits (`bool`, *optional*): Whether to return the controllers' logits, and in mode `moe` the
                load-balancing loss. Defaults to `config.output_router_logits`.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0): Number of last columns, or indices of
                columns, to compute logits for; 0 for all.

        Returns:
            `MoeCausalLMOutputWithPast`: `loss` in nats per token (with labels), `logits` `[B, T, vocab_size]`, and
            what was asked for.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
            "mixing": mixing,
            "token_mask": token_mask,
        }
        return self._predict(inputs, labels, output_router_logits, logits_to_keep, **kwargs)

    def generate_batch(self, *args: Any, mixing: str | None = None, **kwargs: Any) -> Any:
        """Generate by continuous batching, as transformers does, in a mixing mode of this call.

        Args:
            args, kwargs: Those of transformers' `generate_batch`.
            mixing (`str`, *optional*): `"per_sequence"` or `"moe"`. Defaults to the mode of the configuration.

        Raises:
            ValueError: The mode is unknown, or `cross_example`: all requests share one row, so there are no others.
        """
        mode = self._resolve_mixing(mixing)
        if mode == "cross_example":
            raise ValueError(
                "mixing='cross_example' mixes different rows of the batch, and continuous batching puts all requests "
                "into one. Pass mixing='per_sequence' or 'moe', or use `generate` on a batch of rows."
            )
        # transformers drops the arguments that it does not know.
        name = "mixing" if self.training else "inference_mixing"
        configured = getattr(self.config, name)
        setattr(self.config, name, mode)
        try:
            return super().generate_batch(*args, **kwargs)
        finally:
            setattr(self.config, name, configured)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,  # `generate` accepts embeddings where this signature names them
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepare one step of `generate()`: transformers' own, and the padding of this step's tokens."""
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        # A static cache turns the attention mask into a 4-D one, which no longer tells padding from tokens.
        is_mixed = self._resolve_mixing(kwargs.get("mixing")) == "cross_example"
        if is_mixed and attention_mask is not None and attention_mask.ndim == 2:
            ids, embeddings = model_inputs.get("input_ids"), model_inputs.get("inputs_embeds")
            num_columns = (embeddings if ids is None else ids).shape[1]
            model_inputs["token_mask"] = attention_mask[:, -num_columns:]
        return model_inputs


@dataclass
class MoTMaskedLMOutput(MaskedLMOutput):
    """Output of `MoTForMaskedLM`: that of other masked language models, and the controllers' logits.

    Args:
        aux_loss (`torch.Tensor`, *optional*): Load-balancing loss, in mode `moe` with `output_router_logits`.
        router_logits (`tuple(torch.Tensor)`, *optional*): Logits `[S, E]` of each MoT layer's controller.
    """

    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


class MoTForMaskedLM(MoTLanguageModel):
    """A bidirectional MoT masked language model; it works on a copy of the configuration with `is_causal=False`."""

    def __init__(self, config: MoTConfig) -> None:
        config = copy.deepcopy(config)
        # In the configuration, so that a backbone or another head loaded from this checkpoint is bidirectional too.
        config.is_causal = False
        super().__init__(config)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_router_logits: bool | None = None,
        mixing: str | None = None,
        token_mask: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoTMaskedLMOutput:
        r"""Predict the masked tokens; arguments as in [`MoTModel.forward`], and these.

        Args:
            labels (`torch.Tensor` of shape `[B, T]`, *optional*): The original tokens where one is to be predicted,
                -100 elsewhere.
            output_router_logits (`bool`, *optional*): Whether to return the controllers' logits, and in mode `moe` the
                load-balancing loss. Defaults to `config.output_router_logits`.

        Returns:
            `MoTMaskedLMOutput`: `loss` in nats per predicted token (with labels), `logits` `[B, T, vocab_size]`, and
            what was asked for.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "use_cache": False,
            "mixing": mixing,
            "token_mask": token_mask,
        }
        outputs = self._predict(inputs, labels, output_router_logits, **kwargs)
        return MoTMaskedLMOutput(**outputs)


class MoTForSequenceClassification(GenericForSequenceClassification, MoTPreTrainedModel):
    """A MoT model that classifies sequences by their last token that is not padding."""

    def __init__(self, config: MoTConfig) -> None:
        MoTPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = MoTModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class MoTForTokenClassification(GenericForTokenClassification, MoTPreTrainedModel):
    """A MoT model that classifies every token."""

    def __init__(self, config: MoTConfig) -> None:
        MoTPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = MoTModel(config)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", 0.1))
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class MoTForQuestionAnswering(GenericForQuestionAnswering, MoTPreTrainedModel):
    """A MoT model that marks the span of text that answers a question."""

    def __init__(self, config: MoTConfig) -> None:
        MoTPreTrainedModel.__init__(self, config)
        self.model = MoTModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


def _check_mode(name: str, mode: str) -> str:
    if mode not in MIXING_MODES:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, MIXING_MODES))}, got {mode!r}.")
    return mode


__all__ = [
    "MoTForCausalLM",
    "MoTForMaskedLM",
    "MoTForQuestionAnswering",
    "MoTForSequenceClassification",
    "MoTForTokenClassification",
    "MoTModel",
    "MoTPreTrainedModel",
]
