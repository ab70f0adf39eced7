"""The model code that travels with a checkpoint: configuration, mixing and models."""

from .configuration_mot import MixingMode, MoTConfig
from .heads_mot import (
    MoTForCausalLM,
    MoTForMaskedLM,
    MoTForQuestionAnswering,
    MoTForSequenceClassification,
    MoTForTokenClassification,
)
from .modeling_mot import MoTModel, MoTPreTrainedModel

__all__ = [
    "MixingMode",
    "MoTConfig",
    "MoTForCausalLM",
    "MoTForMaskedLM",
    "MoTForQuestionAnswering",
    "MoTForSequenceClassification",
    "MoTForTokenClassification",
    "MoTModel",
    "MoTPreTrainedModel",
]
