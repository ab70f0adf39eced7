"""Accuracy of a language model, as a module of `evaluate`."""

import evaluate

from mot_hf.metrics import TokenTotals
from mot_hf.metrics.modules.info import make_info


class Accuracy(evaluate.Metric):
    """Share of the predicted tokens that were the model's most probable one."""

    def _info(self) -> evaluate.MetricInfo:
        return make_info("Share of the predicted tokens that were the model's most probable one.")

    def _compute(self, predictions: list[list[float]]) -> dict[str, float]:
        return {"accuracy": TokenTotals.of_rows(predictions).accuracy()}
