"""Registration of the MoT models with the Auto classes of transformers."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto import modeling_auto

from mot_hf.modeling import (
    MoTConfig,
    MoTForCausalLM,
    MoTForMaskedLM,
    MoTForQuestionAnswering,
    MoTForSequenceClassification,
    MoTForTokenClassification,
    MoTModel,
)

# The model class of each Auto class, and the table where transformers looks up its name.
AUTO_CLASSES = {
    AutoModel: (MoTModel, modeling_auto.MODEL_MAPPING_NAMES),
    AutoModelForCausalLM: (MoTForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    AutoModelForMaskedLM: (MoTForMaskedLM, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    AutoModelForSequenceClassification: (
        MoTForSequenceClassification,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    AutoModelForTokenClassification: (
        MoTForTokenClassification,
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    ),
    AutoModelForQuestionAnswering: (
        MoTForQuestionAnswering,
        modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    ),
}


def register() -> None:
    """Registers the model type `"mot"` with the Auto classes, and includes the code of the models in checkpoints."""
    AutoConfig.register(MoTConfig.model_type, MoTConfig, exist_ok=True)
    MoTConfig.register_for_auto_class()
    for auto_class, (model_class, names) in AUTO_CLASSES.items():
        auto_class.register(MoTConfig, model_class, exist_ok=True)
        # Label smoothing in Trainer, the pipelines and model cards look up classes by name in these tables.
        names[MoTConfig.model_type] = model_class.__name__
