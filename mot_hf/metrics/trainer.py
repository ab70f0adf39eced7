"""Measures of a language model in the stock `Trainer`, without keeping the logits."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import EvalPrediction, PreTrainedTokenizerFast

from mot_hf.data.tokenizer import token_byte_counts
from mot_hf.metrics.language_modeling import TokenTotals

IGNORED = -100
NUM_SUMS = 4
# number of tokens whose logits are converted to float32 at once
CHUNK_LENGTH = 512


class LanguageModelMetrics:
    """Computes token loss, perplexity, bits per byte and accuracy in the stock `Trainer`:

        metrics = LanguageModelMetrics(tokenizer)
        Trainer(
            ...,
            compute_metrics=metrics.compute_metrics,
            preprocess_logits_for_metrics=metrics.preprocess_logits,
        )

    Each token with a label counts once, regardless of padding, batches and processes. The trainer's own `eval_loss`
    differs: it averages the means of the batches, and includes a load-balancing loss. Only four sums per row are kept.

    Args:
        tokenizer ([`PreTrainedTokenizerFast`], *optional*):
            The byte-level BPE tokenizer of the labels. Without it, bits per byte are not computed.
        masked (`bool`, *optional*, defaults to `False`):
            Whether the logits of a column predict the label of the same column, as in a masked language model, instead
            of the next one.

    Raises:
        ValueError: If the tokenizer is not byte-level.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast | None = None, *, masked: bool = False) -> None:
        self.byte_counts = None if tokenizer is None else token_byte_counts(tokenizer)
        self.masked = masked
        self._sums = torch.zeros(NUM_SUMS, dtype=torch.float64)

    @torch.no_grad()
    def preprocess_logits(self, logits: Tensor | tuple, labels: Tensor | None) -> Tensor:
        """Reduces the logits of a batch to sums over the predicted tokens of each row.

        Args:
            logits (`torch.Tensor` of shape `[B, T, V]`, or a `tuple` with it):
                The logits, or all outputs of the model except its loss.
            labels (`torch.Tensor` of shape `[B, T]`):
                Token ids; -100 where nothing is predicted.

        Returns:
            `torch.Tensor` of shape `[B, 4]`: The loss in nats, and the numbers of correctly predicted tokens, of
            predicted tokens and of their bytes (0 without a tokenizer), in float32.

        Raises:
            ValueError: If there are no labels, or they do not match the logits.
        """
        logits = _find_logits(logits)
        if labels is None or labels.shape != logits.shape[:2]:
            raise ValueError(
                f"`labels` of shape {None if labels is None else list(labels.shape)} do not match `logits` of shape "
                f"{list(logits.shape)}: give every batch labels [B, T], or use a trainer without "
                "`preprocess_logits_for_metrics`."
            )
        targets = labels.to(logits.device)
        if not self.masked:
            targets = F.pad(targets, (0, 1), value=IGNORED)[:, 1:]
        losses = _token_losses(logits, targets)  # [B, T]
        is_correct = logits.argmax(-1) == targets
        return torch.stack(
            [tokens.sum(1).float() for tokens in (losses, is_correct, targets != IGNORED, self._count_bytes(targets))],
            dim=1,
        )

    def _count_bytes(self, targets: Tensor) -> Tensor:
        if self.byte_counts is None:
            return torch.zeros_like(targets)
        counts = self.byte_counts.to(targets.device)[targets.clamp(min=0)]  # [B, T]
        return counts * (targets != IGNORED)

    def compute_metrics(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Computes the measures from the sums of all rows.

        Args:
            prediction (`EvalPrediction`):
                Its `predictions` are the sums `[num_rows, 4]` from [`~LanguageModelMetrics.preprocess_logits`].
            compute_result (`bool`, *optional*, defaults to `True`):
                Whether these are the last rows. With `batch_eval_metrics=True`, the trainer passes one batch at a time
                and sets this argument. Make a new instance after an interrupted evaluation.

        Returns:
            `dict[str, float]`: `token_loss` (nats per token), `perplexity`, `accuracy` and, with a tokenizer,
            `bits_per_byte`. Empty before the last rows.

        Raises:
            ValueError: If the predictions are not such sums, or no token was predicted.
        """
        # a list of batches with eval_do_concat_batches=False
        batches = prediction.predictions if isinstance(prediction.predictions, list) else [prediction.predictions]
        for rows in batches:
            self._sums = self._sums + _add_rows(rows)
        if not compute_result:
            return {}
        sums, self._sums = self._sums, torch.zeros_like(self._sums)
        totals = TokenTotals(*sums.tolist())
        results = {
            "token_loss": totals.token_loss(),
            "perplexity": totals.perplexity(),
            "accuracy": totals.accuracy(),
        }
        return results if self.byte_counts is None else results | {"bits_per_byte": totals.bits_per_byte()}


def _find_logits(outputs: Tensor | tuple) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs
    # the load-balancing loss, a scalar, comes before them
    return next((output for output in outputs if isinstance(output, Tensor) and output.ndim == 3), outputs[0])


def _token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    chunks = zip(logits.flatten(0, 1).split(CHUNK_LENGTH), targets.flatten().split(CHUNK_LENGTH), strict=True)
    losses = [F.cross_entropy(rows.float(), ids, ignore_index=IGNORED, reduction="none") for rows, ids in chunks]
    return torch.cat(losses).view_as(targets)


def _add_rows(rows: Any) -> Tensor:
    if getattr(rows, "ndim", 0) != 2 or rows.shape[1] != NUM_SUMS:
        raise ValueError(
            f"`predictions` of shape {list(getattr(rows, 'shape', []))} must be sums [num_rows, {NUM_SUMS}]: pass "
            "`preprocess_logits_for_metrics=metrics.preprocess_logits` to the trainer."
        )
    return torch.as_tensor(rows).cpu().double().sum(0)
