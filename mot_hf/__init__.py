"""Mixture of Tokens for Hugging Face: importing this package makes the Auto classes know MoT models."""

from mot_hf.modeling import (
    MoTConfig,
    MoTForCausalLM,
    MoTForMaskedLM,
    MoTForQuestionAnswering,
    MoTForSequenceClassification,
    MoTForTokenClassification,
    MoTModel,
    MoTPreTrainedModel,
)
from mot_hf.registration import register
from mot_hf.version import __version__

register()

__all__ = [
    "MoTConfig",
    "MoTForCausalLM",
    "MoTForMaskedLM",
    "MoTForQuestionAnswering",
    "MoTForSequenceClassification",
    "MoTForTokenClassification",
    "MoTModel",
    "MoTPreTrainedModel",
    "__version__",
]
