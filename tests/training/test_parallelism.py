"""What is refused before a model is spread over processes."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import PropertyMock, patch

import pytest
from datasets import DatasetDict
from transformers import TrainingArguments
from transformers.distributed import DistributedConfig

from mot_hf.training import MethodArguments, add_callbacks, finetune_classification
from mot_hf.training.parallelism import check_layout, make_layout
from tests.models import tiny_config

pytestmark = pytest.mark.skipif(
    "ep_size" not in DistributedConfig.__dataclass_fields__, reason="this transformers has another expert parallelism"
)


def layout_of(folder: Path, num_processes: int, method: dict[str, Any], **arguments: Any) -> DistributedConfig | None:
    with patch.dict(os.environ):  # what it is told to compile with, it writes there
        args = TrainingArguments(str(folder), use_cpu=True, **arguments)
    with patch.object(TrainingArguments, "world_size", PropertyMock(return_value=num_processes)):
        return make_layout(MethodArguments(**method), args)


def test_sizes_become_transformers_own_description(tmp_path: Path) -> None:
    assert layout_of(tmp_path, 4, {}) is None
    layout = layout_of(tmp_path, 4, {"tp_size": 2, "fsdp_size": 2, "ep_size": 4})
    assert layout is not None
    sizes = (layout.tp_size, layout.fsdp_size, layout.ep_size, layout.ep_implementation)
    assert sizes == (2, 2, 4, "mot_all_to_all")


@pytest.mark.parametrize(
    ("num_processes", "method", "arguments", "reason"),
    [
        (4, {"tp_size": 2}, {}, r"tp_size \* fsdp_size = 2 \* 1 = 2, but there are 4 processes"),
        (1, {"ep_size": 2}, {}, r"`ep_size` must divide"),
        (2, {"tp_size": 2, "fsdp_size": 2}, {}, r"tp_size \* fsdp_size = 2 \* 2 = 4, but there are 2 processes"),
        (4, {"fsdp_size": 4, "ep_size": 3}, {}, r"`ep_size` must divide"),
        (4, {"tp_size": 4, "ep_size": 2}, {}, r"`ep_size` must be a multiple of `tp_size`"),
        (2, {"fsdp_size": 2, "lora_rank": 2}, {}, r"fsdp_size=2 does not work together with `lora_rank`"),
        (2, {"tp_size": 2}, {"torch_compile": True}, r"tp_size=2 does not work together with `torch_compile`"),
        (
            2,
            {"fsdp_size": 2},
            {"load_best_model_at_end": True, "eval_strategy": "steps"},
            "with `load_best_model_at_end`: leave one out",
        ),
    ],
)
def test_unfit_sizes_are_refused(
    tmp_path: Path, num_processes: int, method: dict[str, Any], arguments: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        layout_of(tmp_path, num_processes, method, **arguments)


@pytest.mark.parametrize("bf16", [False, True])
def test_weights_are_gathered_in_the_precision_of_the_run(tmp_path: Path, bf16: bool) -> None:
    layout = layout_of(tmp_path, 2, {"fsdp_size": 2}, bf16=bf16)
    assert layout is not None
    assert layout.fsdp_mixed_precision is bf16


def test_a_micro_batch_below_a_group_is_refused(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True, per_device_train_batch_size=2)
    layout = DistributedConfig(fsdp_size=2)
    check_layout(layout, tiny_config(mixing="per_sequence"), args)
    with pytest.raises(ValueError, match=r"`per_device_train_batch_size=2` is less than `group_size` \(4\)"):
        check_layout(layout, tiny_config(), args)


def test_classifiers_are_not_spread(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="Classifiers are whole in every process: leave out `tp_size`"):
        finetune_classification("model", DatasetDict(), args, MethodArguments(fsdp_size=2))


def test_a_model_that_is_spread_is_not_compiled_by_another_trainer_either() -> None:
    model, args = SimpleNamespace(is_distributed_loading_by_transformers=True), SimpleNamespace(torch_compile=True)
    with pytest.raises(ValueError, match="`torch_compile` does not work together with a model that is spread"):
        add_callbacks(cast(Any, SimpleNamespace(model=model, args=args)))
