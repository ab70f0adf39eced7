"""Loads the measures as modules of the library `evaluate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaluate import EvaluationModule

METRICS = ("accuracy", "bits_per_byte", "perplexity", "token_loss")


def load_metric(name: str, **kwargs: Any) -> "EvaluationModule":
    """Loads one of the measures as a module of `evaluate`, from this package and without a network.

    The module takes the rows `[B, 4]` of [`LanguageModelMetrics.preprocess_logits`] as `predictions`, and no
    references. `evaluate.combine` joins several. This needs `evaluate`, which the extra `train` installs.

    Args:
        name (`str`): One of `METRICS`.
        kwargs (*optional*): Other arguments of `evaluate.load`, for example `keep_in_memory=True`.

    Returns:
        `evaluate.EvaluationModule`: The module. Its result has one key, `name`.

    Raises:
        ValueError: If there is no measure of that name.
    """
    if name not in METRICS:
        raise ValueError(f"`name={name!r}` is not a measure: use one of {', '.join(METRICS)}.")
    import evaluate

    return evaluate.load(str(Path(__file__).with_name("evaluate_module.py")), name, **kwargs)
