"""The model code that travels with a checkpoint: configuration, mixing and models."""

from .configuration_mot import MixingMode, MoTConfig
from .modeling_mot import (
    MoTForCausalLM,
    MoTForMaskedLM,
    MoTForQuestionAnswering,
    MoTForSequenceClassification,
    MoTForTokenClassification,
    MoTModel,
    MoTPreTrainedModel,
)

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
