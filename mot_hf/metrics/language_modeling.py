"""Loss, perplexity, bits per byte and accuracy from sums over the predicted tokens."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


def perplexity(loss: float) -> float:
    """Turns a loss into the equivalent number of equally likely tokens.

    Args:
        loss (`float`): Mean loss in nats per token.

    Returns:
        `float`: The perplexity; infinite if it is too large for a float.
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def bits_per_byte(loss: float, num_tokens: float, num_bytes: float) -> float:
    """Turns a loss per token into one per byte of text, comparable between tokenizers.

    Args:
        loss (`float`): Mean loss in nats per predicted token.
        num_tokens (`float`): Number of predicted tokens.
        num_bytes (`float`): Number of UTF-8 bytes of these tokens.

    Returns:
        `float`: Bits per byte.

    Raises:
        ValueError: If `num_bytes` is not positive.
    """
    if num_bytes < 1:
        raise ValueError(f"`num_bytes={num_bytes:g}` must be at least 1: the predicted tokens have no text.")
    return loss * num_tokens / (num_bytes * math.log(2))


@dataclass(frozen=True)
class TokenTotals:
    """Sums over the predicted tokens of a text. The measures follow from them, with equal weight for each token.

    Args:
        loss (`float`): Sum of the tokens' losses, in nats.
        num_correct (`float`): Number of correctly predicted tokens.
        num_tokens (`float`): Number of predicted tokens.
        num_bytes (`float`): Number of UTF-8 bytes of these tokens; 0 if unknown.

    Raises:
        ValueError: If no token is predicted.
    """

    loss: float
    num_correct: float
    num_tokens: float
    num_bytes: float

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(
                f"`num_tokens={self.num_tokens:g}`: no token is predicted. Give rows with labels other than -100, "
                "with at least two tokens for a causal model."
            )

    @classmethod
    def of_rows(cls, rows: ArrayLike) -> "TokenTotals":
        """Sums rows, in float64.

        Args:
            rows (array of shape `[B, 4]`): The four sums of each row, as returned by
                [`LanguageModelMetrics.preprocess_logits`].

        Returns:
            [`TokenTotals`]: Their sum.
        """
        return cls(*np.asarray(rows, dtype=np.float64).sum(0).tolist())

    def token_loss(self) -> float:
        """Computes the mean loss in nats per predicted token."""
        return self.loss / self.num_tokens

    def perplexity(self) -> float:
        """Computes the number of equally likely tokens that is equivalent to the mean loss."""
        return perplexity(self.token_loss())

    def bits_per_byte(self) -> float:
        """Computes the loss in bits per byte of text; raises a `ValueError` if the text is empty or unknown."""
        return bits_per_byte(self.token_loss(), self.num_tokens, self.num_bytes)

    def accuracy(self) -> float:
        """Computes the share of tokens for which the most probable prediction is correct."""
        return self.num_correct / self.num_tokens
