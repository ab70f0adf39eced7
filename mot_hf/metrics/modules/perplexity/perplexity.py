"""Perplexity of a language model, as a module of `evaluate`."""

import evaluate

from mot_hf.metrics import TokenTotals
from mot_hf.metrics.modules.info import make_info


class Perplexity(evaluate.Metric):
    """Number of equally likely tokens that the mean loss of the predicted tokens amounts to."""

    def _info(self) -> evaluate.MetricInfo:
        return make_info("Number of equally likely tokens that the mean loss of the predicted tokens amounts to.")

    def _compute(self, predictions: list[list[float]]) -> dict[str, float]:
        return {"perplexity": TokenTotals.of_rows(predictions).perplexity()}
