"""What `import mot_hf` does to transformers, and what it does not load."""

import subprocess
import sys
from pathlib import Path

import pytest
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

import mot_hf
from mot_hf.registration import register
from tests.models import tiny_config

REGISTERED = [
    (AutoModel, mot_hf.MoTModel, "MODEL_MAPPING_NAMES"),
    (AutoModelForCausalLM, mot_hf.MoTForCausalLM, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    (AutoModelForMaskedLM, mot_hf.MoTForMaskedLM, "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    (
        AutoModelForSequenceClassification,
        mot_hf.MoTForSequenceClassification,
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    ),
    (
        AutoModelForTokenClassification,
        mot_hf.MoTForTokenClassification,
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    ),
    (AutoModelForQuestionAnswering, mot_hf.MoTForQuestionAnswering, "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES"),
]
each_auto_class = pytest.mark.parametrize(
    ("auto_class", "model_class", "table"), REGISTERED, ids=lambda value: getattr(value, "__name__", "")
)


def test_the_configuration_is_known_by_its_model_type(tmp_path: Path) -> None:
    config = AutoConfig.for_model("mot", group_size=4, num_experts=8)
    assert type(config) is mot_hf.MoTConfig
    assert (config.group_size, config.num_experts) == (4, 8)
    config.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is mot_hf.MoTConfig


@each_auto_class
def test_auto_classes_make_and_load_models(auto_class: type, model_class: type, table: str, tmp_path: Path) -> None:
    made = auto_class.from_config(tiny_config())
    assert type(made) is model_class
    made.save_pretrained(tmp_path)
    loaded, report = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is model_class
    assert not any(report.values())


@each_auto_class
def test_name_tables_hold_the_class_name(auto_class: type, model_class: type, table: str) -> None:
    assert getattr(modeling_auto, table)["mot"] == model_class.__name__


def test_registering_twice_changes_nothing() -> None:
    before = {table: dict(getattr(modeling_auto, table)) for _, _, table in REGISTERED}
    register()
    assert {table: dict(getattr(modeling_auto, table)) for _, _, table in REGISTERED} == before


def test_public_names_exist_and_are_one_class_each() -> None:
    assert len(set(mot_hf.__all__)) == len(mot_hf.__all__)
    for name in mot_hf.__all__:
        assert hasattr(mot_hf, name)
        if name != "__version__":
            assert getattr(mot_hf, name) is getattr(mot_hf.modeling, name)
            assert getattr(mot_hf, name).__module__.startswith("mot_hf.modeling.")


def test_import_loads_no_heavy_package_that_transformers_does_not() -> None:
    heavy = {"datasets", "matplotlib", "rich", "evaluate", "typer", "pandas", "pyarrow", "transformers.trainer"}
    code = (
        "import sys\n"
        "import transformers.models.qwen3_moe.modeling_qwen3_moe, transformers.models.auto.modeling_auto\n"
        "before = set(sys.modules)\n"
        "import mot_hf\n"
        f"print(sorted({heavy} & (set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
