"""The public API, pinned."""

from importlib.metadata import version

import mot_hf
import mot_hf.metrics
import mot_hf.modeling
import mot_hf.training
from tests.scripts.running import REPOSITORY

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
    metrics = ["METRICS", "LanguageModelMetrics", "TokenTotals", "bits_per_byte", "load_metric", "perplexity"]
    assert mot_hf.metrics.__all__ == metrics
    assert mot_hf.training.__all__ == [
        "CompanionSynchronization",
        "CorpusArguments",
        "DiskSpaceCheck",
        "FiniteCheck",
        "GenerationSettingsCheck",
        "GroupSizeCheck",
        "MethodArguments",
        "MixingMonitor",
        "ModelArguments",
        "OptimizerCheck",
        "ResumeCheck",
        "RunPlan",
        "ThresholdBalancing",
        "TransitionTuning",
        "VocabularyCheck",
        "add_callbacks",
        "add_lora",
        "end_processes",
        "find_checkpoint",
        "find_damage",
        "find_last_checkpoint",
        "find_recipe",
        "finetune_and_evaluate",
        "finetune_classification",
        "list_recipes",
        "parse_arguments",
        "run_training",
        "train_language_model",
        "tune_transition",
    ]
    for module in (mot_hf, mot_hf.modeling, mot_hf.metrics, mot_hf.training):
        assert all(hasattr(module, name) for name in module.__all__)


def test_version_is_that_of_the_distribution_and_of_the_citation() -> None:
    assert mot_hf.__version__ == version("mot_hf")
    assert f"\nversion: {mot_hf.__version__}\n" in (REPOSITORY / "CITATION.cff").read_text()
