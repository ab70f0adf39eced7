"""The perplexity."""
