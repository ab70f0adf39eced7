"""The module of `evaluate` behind [`mot_hf.metrics.load_metric`], with each measure as a configuration.

`evaluate` copies this file elsewhere and takes its first class that is an `EvaluationModule`, so the file must not
import such a class by name.
"""

from typing import Any

import evaluate
from datasets import Features, Sequence, Value

from mot_hf.metrics import TokenTotals

DESCRIPTIONS = {
    "accuracy": "Share of tokens for which the most probable prediction is correct.",
    "bits_per_byte": "Loss in bits per byte of the predicted text, comparable between tokenizers.",
    "perplexity": "Number of equally likely tokens that is equivalent to the mean loss.",
    "token_loss": "Mean loss in nats per predicted token.",
}
INPUTS = """
Args:
    predictions (array of shape `[B, 4]`): For each row the sum over its predicted tokens of the loss in nats, and the
        numbers of correctly predicted tokens, of predicted tokens and of their UTF-8 bytes, as returned by
        `mot_hf.metrics.LanguageModelMetrics.preprocess_logits`.
"""


class LanguageModelMeasure(evaluate.Metric):
    """One of the measures, named by its configuration."""

    def __init__(self, config_name: str, **kwargs: Any) -> None:
        super().__init__(config_name, **kwargs)
        # evaluate names a module after its class, but combined modules must have different names
        self.info.module_name = config_name

    def _info(self) -> evaluate.MetricInfo:
        features = Features({"predictions": Sequence(Value("float64"), length=4)})
        description = DESCRIPTIONS[self.config_name]
        return evaluate.MetricInfo(description=description, citation="", features=features, inputs_description=INPUTS)

    def _compute(self, predictions: list[list[float]]) -> dict[str, float]:
        return {self.name: getattr(TokenTotals.of_rows(predictions), self.name)()}
