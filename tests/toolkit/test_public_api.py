"""The public API, pinned."""

from importlib.metadata import version

import mot_hf
import mot_hf.metrics
import mot_hf.modeling
import mot_hf.reporting
import mot_hf.training

MODELS = [
    "MoTConfig",
    "MoTForCausalLM",
    "MoTForMaskedLM",
    "MoTForQuestionAnswering",
    "MoTForSequenceClassification",
    "MoTForTokenClassification",
    "MoTModel",
    "MoTPreTrainedModel",
]


def test_names() -> None:
    assert sorted(mot_hf.__all__) == [*MODELS, "__version__"]
    assert sorted(mot_hf.modeling.__all__) == ["MixingMode", *MODELS]
    assert mot_hf.metrics.__all__ == ["bits_per_byte", "perplexity"]
    assert mot_hf.reporting.__all__ == ["ModelSize", "count_parameters", "plot_training_curve"]
    training = ["CorpusArguments", "ModelArguments", "parse_arguments", "train_language_model"]
    assert mot_hf.training.__all__ == training
    for module in (mot_hf, mot_hf.modeling, mot_hf.metrics, mot_hf.reporting, mot_hf.training):
        assert all(hasattr(module, name) for name in module.__all__)


def test_version_is_that_of_the_distribution() -> None:
    assert mot_hf.__version__ == version("mot_hf")
