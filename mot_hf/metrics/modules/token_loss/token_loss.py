"""Mean loss of a language model, as a module of `evaluate`."""

import evaluate

from mot_hf.metrics import TokenTotals
from mot_hf.metrics.modules.info import make_info


class TokenLoss(evaluate.Metric):
    """Mean loss in nats per predicted token."""

    def _info(self) -> evaluate.MetricInfo:
        return make_info("Mean loss in nats per predicted token.")

    def _compute(self, predictions: list[list[float]]) -> dict[str, float]:
        return {"token_loss": TokenTotals.of_rows(predictions).token_loss()}
