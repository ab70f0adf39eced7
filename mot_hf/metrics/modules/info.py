"""What the modules share: their input."""

import evaluate
from datasets import Features, Sequence, Value

INPUTS = """
Args:
    predictions (array of shape `[B, 4]`): For each row the sum over its predicted tokens of the loss in nats, and the
        numbers of tokens predicted right, of predicted tokens and of their UTF-8 bytes, as
        `mot_hf.metrics.LanguageModelMetrics.preprocess_logits` makes them.
"""


def make_info(description: str) -> evaluate.MetricInfo:
    """Describes a measure of rows of sums.

    Args:
        description (`str`): What it measures.

    Returns:
        `evaluate.MetricInfo`: The description with the input that all measures have.
    """
    features = Features({"predictions": Sequence(Value("float64"), length=4)})
    return evaluate.MetricInfo(description=description, citation="", features=features, inputs_description=INPUTS)
