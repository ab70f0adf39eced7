"""Measures of language models."""

from mot_hf.metrics.language_modeling import bits_per_byte, perplexity

__all__ = ["bits_per_byte", "perplexity"]
