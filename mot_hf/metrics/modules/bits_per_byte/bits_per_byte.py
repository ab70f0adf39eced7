"""Bits per byte of a language model, as a module of `evaluate`."""

import evaluate

from mot_hf.metrics import TokenTotals
from mot_hf.metrics.modules.info import make_info


class BitsPerByte(evaluate.Metric):
    """Loss in bits per byte of the predicted tokens' text, comparable between tokenizers."""

    def _info(self) -> evaluate.MetricInfo:
        return make_info("Loss in bits per byte of the predicted tokens' text, comparable between tokenizers.")

    def _compute(self, predictions: list[list[float]]) -> dict[str, float]:
        return {"bits_per_byte": TokenTotals.of_rows(predictions).bits_per_byte()}
