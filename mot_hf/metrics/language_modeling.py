"""Perplexity and bits per byte from a mean loss."""

import math


def perplexity(loss: float) -> float:
    """Turns a loss into the number of equally likely tokens it amounts to.

    Args:
        loss (`float`): Mean loss in nats per token.

    Returns:
        `float`: The perplexity; infinite where it is too large for a float.
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def bits_per_byte(loss: float, num_tokens: int, num_bytes: int) -> float:
    """Turns a loss per token into one per byte of text, comparable between tokenizers.

    Args:
        loss (`float`): Mean loss in nats per predicted token.
        num_tokens (`int`): Number of predicted tokens.
        num_bytes (`int`): Number of UTF-8 bytes that these tokens stand for.

    Returns:
        `float`: Bits per byte.

    Raises:
        ValueError: If `num_bytes` is not positive.
    """
    if num_bytes < 1:
        raise ValueError(f"`num_bytes={num_bytes}` must be at least 1: the predicted tokens stand for no text.")
    return loss * num_tokens / (num_bytes * math.log(2))
