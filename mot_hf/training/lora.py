"""LoRA adapters for MoT and dense models, with PEFT."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mot_hf.modeling import MoTPreTrainedModel
from mot_hf.modeling.configuration_mot import find_layers

if TYPE_CHECKING:
    from peft import PeftModel, TaskType

_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# PEFT's kind of task by the end of a class's name, for heads that are new to a pretrained model.
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def refuse_adapters(model_name_or_path: str) -> None:
    """Refuses a folder of adapters where a whole model is to be trained.

    Args:
        model_name_or_path (`str`): The model.

    Raises:
        ValueError: The folder holds adapters.
    """
    if (Path(model_name_or_path) / "adapter_config.json").is_file():
        raise ValueError(
            f"`model_name_or_path={model_name_or_path!r}` holds adapters, not a model: merge them into their model "
            "(`merge_and_unload` of peft) and save that in another folder, or resume their run with "
            "--resume_from_checkpoint."
        )


def add_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: int | float = 16,
    task_type: "TaskType | str | None" = None,
    new_tokens: Sequence[int] = (),
) -> "PeftModel":
    """Freezes a model and adds LoRA adapters to its attention, dense layers and experts.

    The statistics of the typical group are still updated, and are saved with the adapters. Other models get adapters
    on all linear layers below their head, and on their experts if these have the same names as those of MoT (as in
    Qwen3-MoE).

    Args:
        model ([`MoTPreTrainedModel`] or `PreTrainedModel`): The model.
        rank (`int`): Rank of the adapters. Must be at least 1.
        alpha (`int` or `float`, *optional*, defaults to 16): Scale of the adapters, which is divided by their rank.
            Must be above 0.
        task_type (`str`, *optional*): PEFT's name for the kind of head: `"CAUSAL_LM"`, `"SEQ_CLS"` or `"TOKEN_CLS"`. A
            classification head is trained fully, without adapters. Defaults to that of the model's class, if it is
            for classification or question answering.
        new_tokens (`Sequence[int]`, *optional*): Ids of tokens that the model does not know yet: their embeddings are
            trained fully, those of a causal language model's other tokens not at all.

    Returns:
        `PeftModel`: The model with adapters.

    Raises:
        ValueError: `rank` or `alpha` is too small, or the model already has adapters or has no linear layers.
        ImportError: PEFT is not installed.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"`rank={rank!r}` must be a whole number of at least 1.")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
        raise ValueError(f"`alpha={alpha!r}` must be a number above 0.")
    from peft import LoraConfig, get_peft_model

    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "The model already has adapters. Merge them into it first with `PeftModel.from_pretrained(base, "
            "folder).merge_and_unload()`, and save the result in another folder."
        )
    task_type = task_type or _find_task(model)
    parameters = [name for name, _ in model.named_parameters()]  # PEFT has no module for those of experts
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        task_type=task_type,
        target_modules=_find_targets(model),
        target_parameters=[name for name in _EXPERTS if any(path.endswith(name) for path in parameters)] or None,
        modules_to_save=_find_whole(model, task_type) or None,
        trainable_token_indices=_find_embeddings(model, new_tokens) or None,
    )
    return get_peft_model(model, config)


def _find_task(model: PreTrainedModel) -> str | None:
    """The kind of task whose new head PEFT trains fully, by the name of the model's class."""
    name = type(model).__name__
    return next((task for words, task in _TASKS.items() if name.endswith(words)), None)


def _find_targets(model: PreTrainedModel) -> list[str]:
    if isinstance(model, MoTPreTrainedModel):
        return _PROJECTIONS
    # PEFT's own "all-linear" includes the heads of some models, which then cannot be trained fully.
    backbone = {id(module) for module in model.base_model.modules() if isinstance(module, nn.Linear | Conv1D)}
    names = [name for name, module in model.named_modules() if id(module) in backbone]
    if not names:
        raise ValueError(f"{type(model).__name__} has no linear layers for adapters: set `lora_rank=0`.")
    return names


def _find_embeddings(model: PreTrainedModel, new_tokens: Sequence[int]) -> dict[str, list[int]]:
    """The embeddings to train for new tokens, by the names of their modules."""
    if not new_tokens:
        return {}
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    if model.config.get_text_config().tie_word_embeddings:  # PEFT ties the other one to it
        tables = tables[:1]
    names = [name for name, module in model.named_modules() if any(module is table for table in tables)]
    return {name.rpartition(".")[2]: list(new_tokens) for name in names}


def _find_whole(model: PreTrainedModel, task_type: "TaskType | str | None") -> list[str]:
    """Modules that are trained fully, or updated as statistics, and saved as a whole."""
    if isinstance(model, MoTPreTrainedModel):
        return ["companions"] if find_layers(model.config, "sparse") else []
    if task_type not in _TASKS.values():
        return []
    # A new head may have more than the one layer that PEFT expects.
    children = {name: child for name, child in model.named_children() if child is not model.base_model}
    return [name for name, child in children.items() if any(True for _ in child.parameters())]
