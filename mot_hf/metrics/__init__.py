"""Measures of language models."""

from mot_hf.metrics.language_modeling import TokenTotals, bits_per_byte, perplexity
from mot_hf.metrics.loading import METRICS, load_metric
from mot_hf.metrics.trainer import LanguageModelMetrics

__all__ = ["METRICS", "LanguageModelMetrics", "TokenTotals", "bits_per_byte", "load_metric", "perplexity"]
