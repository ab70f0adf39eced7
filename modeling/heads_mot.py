"""The heads of Mixture-of-Tokens models: language models, classification and question answering.

Axes: B rows, T columns, S = B * T tokens, E experts.
"""

import copy
import inspect
import threading
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.generation import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteriaList,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.utils import GenerateNonBeamOutput
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import (
    MaskedLMOutput,
    MoeCausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from .arguments_mot import CACHE_NAME, known_arguments_only, merge_caches
from .configuration_mot import MoTConfig
from .masks_mot import count_cached, find_padding, fit_masks, is_of_tokens, select_columns
from .modeling_mot import MoTModel, MoTPreTrainedModel

logger = logging.get_logger(__name__)

_generating = threading.RLock()

# What each Auto class loads from a checkpoint that comes with this code.
AUTO_MAP = {
    "AutoConfig": "configuration_mot.MoTConfig",
    "AutoModel": "modeling_mot.MoTModel",
    "AutoModelForCausalLM": "heads_mot.MoTForCausalLM",
    "AutoModelForMaskedLM": "heads_mot.MoTForMaskedLM",
    "AutoModelForSequenceClassification": "heads_mot.MoTForSequenceClassification",
    "AutoModelForTokenClassification": "heads_mot.MoTForTokenClassification",
    "AutoModelForQuestionAnswering": "heads_mot.MoTForQuestionAnswering",
}


class MoTLanguageModel(MoTPreTrainedModel):
    """Base of the two language models: the projection to the vocabulary, and the losses."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # pyright: ignore[reportAssignmentType]  # as in transformers
    _fsdp_plan = {"lm_head": "keep_full_weight"}

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
        **kwargs: Unpack[TransformersKwargs],  # pyright: ignore[reportGeneralTypeIssues]  # overlaps, as in transformers
    ) -> MoeCausalLMOutputWithPast:
        """Run the backbone on its `inputs`, project to the vocabulary, and add up the losses."""
        config = self.config
        if output_router_logits is None:
            output_router_logits = config.output_router_logits
        # The other modes need no balancing.
        balances = output_router_logits and self._resolve_mixing(inputs["mixing"]) == "moe"
        mask, token_mask = inputs["attention_mask"], inputs["token_mask"]
        # Before the pass, in which the cache grows.
        num_cached = count_cached(inputs.get(CACHE_NAME), mask) if balances else 0
        outputs = self.model(**inputs, output_router_logits=output_router_logits, **kwargs)
        kept_columns = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept_columns, :])
        loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size, **kwargs)

        aux_loss = None
        if outputs.router_logits and balances:
            # Padding is routed too, but must not count as load.
            _, token_mask = fit_masks(mask, token_mask, outputs.last_hidden_state.shape[1], num_cached)
            token_mask = find_padding(outputs.last_hidden_state, token_mask)
            aux_loss = load_balancing_loss_func(
                outputs.router_logits, config.num_experts, config.num_experts_per_tok, token_mask
            )
            if labels is not None and loss is not None:
                balance = config.router_aux_loss_coef * cast(Tensor, aux_loss).to(loss.device)
                loss = loss + balance * self._share_of_step(labels.to(loss.device), **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )

    def _share_of_step(
        self,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        ignore_index: int = -100,
        **kwargs: Any,
    ) -> Tensor | float:
        """This batch's share of the labels of a step whose losses are added up, if the caller gives their number."""
        if num_items_in_batch is None:
            return 1.0
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(labels.device)
        if shift_labels is not None:
            labels = shift_labels.to(labels.device)
        elif self.config.is_causal:
            labels = labels[..., 1:]
        return (labels != ignore_index).sum() / num_items_in_batch


class RowEnds(StoppingCriteriaList):
    """Stopping criteria that remember which rows of a generation have ended.

    Args:
        criteria (`StoppingCriteriaList`): The criteria; a row ends when it meets one of them.
        num_rows (`int`): Number of rows B.
        device (`torch.device`): Device of the tokens.
    """

    def __init__(self, criteria: StoppingCriteriaList, num_rows: int, device: torch.device) -> None:
        super().__init__(criteria)
        # [B], number of a row's last columns that no longer count: its last token and the padding after it
        self.num_idle = torch.zeros(num_rows, dtype=torch.long, device=device)

    def __call__(self, input_ids: Tensor, scores: tuple[Tensor] | None, **kwargs: Any) -> Tensor:
        """Return which rows meet a criterion after each got another token: `[B]`."""
        is_done = super().__call__(input_ids, scores, **kwargs)
        self.num_idle = torch.where(is_done | (self.num_idle > 0), self.num_idle + 1, 0)
        return is_done

    def mask(self, num_columns: int) -> Tensor:
        """Return which of the last T columns still count: `[B, T]`."""
        return torch.arange(num_columns, 0, -1, device=self.num_idle.device) > self.num_idle[:, None]


class MoTForCausalLM(MoTLanguageModel, GenerationMixin):
    """A causal MoT language model.

    Raises:
        ValueError: The configuration has `is_causal=False`, which would let a token see its own future.
    """

    def __init__(self, config: MoTConfig) -> None:
        if not config.is_causal:
            raise ValueError(
                "`MoTForCausalLM` needs `is_causal=True`, got False: this is a masked language model's configuration. "
                "Load it as `MoTForMaskedLM`, or pass `is_causal=True` to train it further as a causal model."
            )
        super().__init__(config)

    @known_arguments_only
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
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],  # pyright: ignore[reportGeneralTypeIssues]  # overlaps, as in transformers
    ) -> MoeCausalLMOutputWithPast:
        r"""Predict the next token at every column; takes the arguments of [`MoTModel.forward`], and these.

        Args:
            labels (`torch.Tensor` of shape `[B, T]`, *optional*): The same tokens as in `input_ids` (they are shifted
                here), -100 for those without a loss.
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
            CACHE_NAME: merge_caches(past_key_values, cache, kwargs),
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
            "mixing": mixing,
            "token_mask": token_mask,
        }
        return self._predict(inputs, labels, output_router_logits, logits_to_keep, **kwargs)

    def generate_batch(self, *args: Any, mixing: str | None = None, **kwargs: Any) -> Any:
        """Generate with transformers' continuous batching, in the given mixing mode.

        Args:
            args, kwargs: Arguments of transformers' `generate_batch`.
            mixing (`str`, *optional*): `"per_sequence"` or `"moe"`. Defaults to `mixing` of the generation
                configuration, else to the configuration's mode.

        Raises:
            ValueError: An argument or the mode is unknown, or the mode is `cross_example`, which needs several rows:
                continuous batching puts all requests into one.
        """
        generation_config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        mode = self._resolve_mixing(mixing or self._find_mixing(generation_config))
        if mode == "cross_example":
            raise ValueError(
                "mixing='cross_example' mixes different rows of the batch, and continuous batching puts all requests "
                "into one. Pass mixing='per_sequence' or 'moe', or use `generate` on a batch of rows."
            )
        known = {*inspect.signature(super().generate_batch).parameters, "max_new_tokens", "input_ids"} - {"kwargs"}
        for name in kwargs.keys() - known:
            _refuse_dropped(name, kwargs[name], generation_config)
        # In the configuration, because the background thread calls the model without further arguments. So calls from
        # several threads take turns.
        name = "mixing" if self.training else "inference_mixing"
        with _generating:
            configured = getattr(self.config, name)
            setattr(self.config, name, mode)
            try:
                return super().generate_batch(*args, **kwargs)
            finally:
                setattr(self.config, name, configured)

    def _find_mixing(self, generation_config: GenerationConfig | None) -> str | None:
        """The mode that a call's generation configuration names, or else the model's, as with any other field."""
        configs = (generation_config, self.generation_config)
        return next((mode for config in configs if (mode := getattr(config, "mixing", None)) is not None), None)

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        mixing = kwargs.pop("mixing", None) or self._find_mixing(generation_config)
        # Pyright: no model has all that the protocol of transformers' `self` asks for.
        prepare = super()._prepare_generation_config  # pyright: ignore[reportAttributeAccessIssue]
        prepared, model_kwargs = prepare(generation_config, **kwargs)
        return prepared, model_kwargs | ({} if mixing is None else {"mixing": mixing})

    def _get_logits_processor(
        self, *args: Any, model_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> LogitsProcessorList:
        get = super()._get_logits_processor  # pyright: ignore[reportAttributeAccessIssue]  # as above
        processors = LogitsProcessorList(get(*args, model_kwargs=model_kwargs, **kwargs))
        mixing = (model_kwargs or {}).get("mixing")
        for index, processor in enumerate(processors):
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor) and processor.model is self:
                # It runs the model itself. A copy, because the caller may use it again in another mode.
                processors[index] = processor = copy.copy(processor)
                processor.model = partial(self, mixing=mixing)
        return processors

    def _sample(
        self, input_ids: Tensor, *args: Any, stopping_criteria: StoppingCriteriaList, **kwargs: Any
    ) -> GenerateNonBeamOutput | Tensor:
        # In greedy decoding and sampling, only here does transformers give access to which rows have ended.
        if self._resolve_mixing(kwargs.get("mixing")) == "cross_example":
            stopping_criteria = RowEnds(stopping_criteria, len(input_ids), input_ids.device)
            kwargs["row_ends"] = stopping_criteria
        sample = super()._sample  # pyright: ignore[reportAttributeAccessIssue]  # as above
        return sample(input_ids, *args, stopping_criteria=stopping_criteria, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,  # `generate` accepts embeddings only if this signature names them
        row_ends: RowEnds | None = None,
        tokenizer: Any = None,  # for stop strings: `generate` would pass it on to the model
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepare the model's inputs for one step of `generate()`, with a mask of the tokens to mix.

        Raises:
            ValueError: A 2-D `attention_mask` has columns after the tokens, where `generate` adds those of new ones.
        """
        prepare = super().prepare_inputs_for_generation  # pyright: ignore[reportAttributeAccessIssue]  # as in `_sample`
        model_inputs = prepare(input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        ids, embeddings = model_inputs.get("input_ids"), model_inputs.get("inputs_embeds")
        num_rows, num_columns = (embeddings if ids is None else ids).shape[:2]
        if is_of_tokens(attention_mask):
            num_tokens = count_cached(kwargs.get(CACHE_NAME), attention_mask) + num_columns
            if attention_mask.shape[1] > num_tokens:
                raise ValueError(
                    f"`attention_mask` has {attention_mask.shape[1]} columns, and there are {num_tokens} tokens in a "
                    "row. `generate` adds the columns of new tokens: give it a mask of the prompt and what is cached."
                )
        if self._resolve_mixing(kwargs.get("mixing")) == "cross_example":
            if num_rows > 1:
                logger.warning_once(
                    "Generating in mode cross_example: the rows of the batch, beams included, influence one another. "
                    "With mixing='per_sequence' every row gets the same result as on its own."
                )
            model_inputs["token_mask"] = self._find_mixed_tokens(attention_mask, row_ends, num_rows, num_columns)
        return model_inputs

    def _find_mixed_tokens(
        self, attention_mask: Tensor | None, row_ends: RowEnds | None, num_rows: int, num_columns: int
    ) -> Tensor:
        """The tokens `[B, T]` of a generation step that are neither padding nor after the end of their row."""
        tokens = torch.ones(num_rows, num_columns, dtype=torch.bool, device=self.device)
        # For a static cache the model gets a 4-D mask, in which padding cannot be told from tokens; this one is 2-D.
        if is_of_tokens(attention_mask):
            tokens &= attention_mask[:, -num_columns:].to(self.device, torch.bool)
        if row_ends is not None:
            tokens &= row_ends.mask(num_columns)
        return tokens


def _refuse_dropped(name: str, value: Any, generation_config: GenerationConfig | None) -> None:
    """Raise for an argument of `generate_batch` that transformers would drop, unless that makes no difference."""
    if name == "attention_mask" and value is not None and not torch.as_tensor(value).all():
        raise ValueError(
            "`attention_mask` has padding, which continuous batching would take for tokens. Give the prompts without "
            "padding: generate_batch([[1, 2], [3, 4, 5]])."
        )
    # `generate` makes a configuration of its arguments, and passes both on.
    if value is None or name == "attention_mask" or getattr(generation_config, name, None) == value:
        return
    raise ValueError(
        f"`generate_batch` takes no argument `{name}`, which transformers would drop. Put the arguments of `generate` "
        "into a `GenerationConfig`: generate_batch(inputs, generation_config)."
    )


@dataclass
class MoTMaskedLMOutput(MaskedLMOutput):
    """Output of `MoTForMaskedLM`: as for other masked language models, plus the controllers' logits.

    Args:
        aux_loss (`torch.Tensor`, *optional*): Load-balancing loss, in mode `moe` with `output_router_logits`.
        router_logits (`tuple(torch.Tensor)`, *optional*): Logits `[S, E]` of each MoT layer's controller.
    """

    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


class MoTForMaskedLM(MoTLanguageModel):
    """A bidirectional MoT masked language model. It uses a copy of the configuration with `is_causal=False`."""

    def __init__(self, config: MoTConfig) -> None:
        config = copy.deepcopy(config)
        # In the configuration, so that a backbone or another head loaded from this checkpoint is bidirectional too.
        config.is_causal = False
        super().__init__(config)

    @known_arguments_only
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        mixing: str | None = None,
        token_mask: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],  # pyright: ignore[reportGeneralTypeIssues]  # overlaps, as in transformers
    ) -> MoTMaskedLMOutput:
        r"""Predict the masked tokens; takes the arguments of [`MoTModel.forward`], and these.

        Args:
            labels (`torch.Tensor` of shape `[B, T]`, *optional*): The original tokens at columns to predict, -100
                elsewhere.
            use_cache (`bool`, *optional*): Must be `False`: the model sees all columns at once and has nothing to
                cache.
            output_router_logits (`bool`, *optional*): Whether to return the controllers' logits, and in mode `moe` the
                load-balancing loss. Defaults to `config.output_router_logits`.

        Returns:
            `MoTMaskedLMOutput`: `loss` in nats per predicted token (with labels), `logits` `[B, T, vocab_size]`, and
            what was asked for.

        Raises:
            ValueError: `use_cache` is `True`, or as in [`MoTModel.forward`].
        """
        if use_cache:
            raise ValueError(
                "`use_cache` must be `False` for `MoTForMaskedLM`, got True: it sees all columns at once."
            )
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
    """A MoT model that classifies sequences by their last token other than padding."""

    # The inherited forward ignores `num_items_in_batch`. Trainer would take it that the loss is divided by it, and
    # multiply losses and gradients by the number of accumulated micro-batches.
    accepts_loss_kwargs = False

    # Not the parent's, which makes the backbone by AutoModel: that does not know classes loaded from a checkpoint.
    def __init__(self, config: MoTConfig) -> None:
        MoTPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = MoTModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @known_arguments_only
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
        mixing: str | None = None,
        token_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],  # pyright: ignore[reportGeneralTypeIssues]  # overlaps, as in transformers
    ) -> SequenceClassifierOutputWithPast:
        r"""Classify every row by its last token; takes the arguments of [`MoTModel.forward`], and these.

        Args:
            attention_mask (`torch.Tensor`, *optional*): A 2-D mask says which token is a row's last. Without one it is
                the last other than `config.pad_token_id`, or of `inputs_embeds` the last column.
            labels (`torch.Tensor`, *optional*): Numbers of classes `[B]`, or what else `config.problem_type` needs.

        Returns:
            `SequenceClassifierOutputWithPast`: `loss` (with labels), `logits` `[B, num_labels]`, and what was asked
            for.
        """
        cache = merge_caches(past_key_values, cache, kwargs)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
            "mixing": mixing,
            "token_mask": token_mask,
            CACHE_NAME: cache,
            **kwargs,
        }
        if not is_of_tokens(attention_mask):
            return super().forward(labels=labels, **inputs)
        num_cached = count_cached(cache, attention_mask)  # before the pass, in which the cache grows
        outputs = self.model(**inputs)
        hidden_states = outputs.last_hidden_state  # [B, T, D]
        num_rows, num_columns = hidden_states.shape[:2]
        is_token = select_columns(attention_mask, num_columns, num_cached).to(hidden_states.device, torch.bool)
        last = (is_token * torch.arange(num_columns, device=hidden_states.device)).argmax(dim=1)  # [B]
        logits = self.score(hidden_states[torch.arange(num_rows, device=hidden_states.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )


class MoTForTokenClassification(GenericForTokenClassification, MoTPreTrainedModel):
    """A MoT model that classifies every token."""

    accepts_loss_kwargs = False  # as in MoTForSequenceClassification

    def __init__(self, config: MoTConfig) -> None:
        MoTPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = MoTModel(config)
        rates = (getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout"))
        self.dropout = nn.Dropout(next((rate for rate in rates if rate is not None), 0.1))  # as in the parent
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    forward = known_arguments_only(GenericForTokenClassification.forward, MoTModel.forward)


class MoTForQuestionAnswering(GenericForQuestionAnswering, MoTPreTrainedModel):
    """A MoT model that marks the span of text that answers a question."""

    def __init__(self, config: MoTConfig) -> None:
        MoTPreTrainedModel.__init__(self, config)
        self.model = MoTModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    forward = known_arguments_only(GenericForQuestionAnswering.forward, MoTModel.forward)


__all__ = [
    "MoTForCausalLM",
    "MoTForMaskedLM",
    "MoTForQuestionAnswering",
    "MoTForSequenceClassification",
    "MoTForTokenClassification",
]
