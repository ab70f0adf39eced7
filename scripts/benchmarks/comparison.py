"""Dense, MoT and Qwen3-MoE models of about equal FLOPs, trained the same way on the same rows."""

import dataclasses
import sysconfig
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, DatasetDict
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from mot_hf.conversion.export import make_qwen3_moe_config
from mot_hf.data.blocks import make_blocks
from mot_hf.data.corpus import load_corpus
from mot_hf.data.tokenizer import train_tokenizer
from mot_hf.modeling import MoTConfig, MoTForCausalLM

ARCHITECTURES = ("dense", "mot", "qwen3_moe")

# Documents that the tokenizer is trained on.
_NUM_TOKENIZER_DOCUMENTS = 2000


@dataclass
class ComparisonArguments:
    """Sizes that all architectures share, and their text."""

    hidden_size: int = field(default=32, metadata={"help": "model width D"})
    intermediate_size: int = field(default=128, metadata={"help": "width of the dense feed-forward layers"})
    num_hidden_layers: int = field(default=3, metadata={"help": "number of blocks"})
    num_dense_layers: int = field(default=0, metadata={"help": "number of first blocks that stay dense"})
    num_attention_heads: int = field(default=2, metadata={"help": "number of attention heads"})
    group_size: int = field(default=32, metadata={"help": "rows G of a group"})
    num_experts: int = field(default=32, metadata={"help": "experts E; Qwen3-MoE runs E / G of them for a token"})
    router_initializer_range: float | None = field(
        default=None, metadata={"help": "initial standard deviation of MoT's controllers; by default the model's own"}
    )
    source: str | None = field(
        default=None,
        metadata={"help": "text, as in the training scripts; by default the Python code of all installed packages"},
    )
    vocab_size: int = field(default=512, metadata={"help": "size of the tokenizer that is trained on the text"})
    block_length: int = field(default=64, metadata={"help": "tokens T of a row"})
    num_eval_rows: int = field(default=2048, metadata={"help": "validation rows"})


def load_text(args: ComparisonArguments) -> DatasetDict:
    """Cuts the text into rows.

    Args:
        args ([`ComparisonArguments`]): Text, tokenizer, length of a row.

    Returns:
        `DatasetDict`: Splits `"train"` and `"validation"` with the column `"input_ids"`, as tensors.

    Raises:
        ValueError: As [`load_corpus`] and [`make_blocks`].
        OSError: The text cannot be read.
    """
    packages = str(Path(sysconfig.get_paths()["purelib"]) / "**" / "*.py")
    corpus = cast(DatasetDict, load_corpus(args.source or packages, validation_fraction=0.02))
    documents = corpus["train"].shuffle(seed=0).select(range(min(_NUM_TOKENIZER_DOCUMENTS, len(corpus["train"]))))
    tokenizer = train_tokenizer(documents["text"], args.vocab_size)
    rows = make_blocks(corpus, tokenizer, block_length=args.block_length, group_size=args.group_size)
    validation = cast(Dataset, rows["validation"])
    validation = validation.select(range(min(args.num_eval_rows, len(validation))))
    return DatasetDict(train=rows["train"], validation=validation).with_format("torch")


def make_model(architecture: str, args: ComparisonArguments) -> PreTrainedModel:
    """Makes a causal model. Models of the same arguments have the same FLOPs per token but for controllers and mixing.

    Args:
        architecture (`str`): `"dense"`, `"mot"` or `"qwen3_moe"`.
        args ([`ComparisonArguments`]): Its sizes.

    Returns:
        `PreTrainedModel`: The model, in training mode. Routers and controllers have the same initial spread.

    Raises:
        ValueError: The architecture is unknown.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"`architecture={architecture!r}` must be one of {', '.join(ARCHITECTURES)}.")
    num_dense = args.num_hidden_layers if architecture == "dense" else args.num_dense_layers
    config = MoTConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        max_position_embeddings=args.block_length,
        group_size=args.group_size,
        num_experts=args.num_experts,
        router_initializer_range=args.router_initializer_range,
        norm_topk_prob=False,  # renormalised, the weight of a single expert is always 1, without a gradient
        mlp_layer_types=["dense"] * num_dense + ["sparse"] * (args.num_hidden_layers - num_dense),
    )
    if architecture != "qwen3_moe":
        return MoTForCausalLM(config).train()
    moe_config = make_qwen3_moe_config(config)
    moe_config.output_router_logits = True
    model = Qwen3MoeForCausalLM(moe_config).train()
    for router in [module for module in model.modules() if isinstance(module, Qwen3MoeTopKRouter)]:
        # A comparison of methods, not of how they begin.
        nn.init.normal_(router.weight, std=config.router_initializer_range)
    return model


def collate_rows(rows: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Stacks rows of equal length.

    Args:
        rows (`list[Mapping[str, torch.Tensor]]`): Rows with `input_ids` `[T]`.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids` and `labels` `[B, T]`.
    """
    ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids}


@torch.no_grad()
def validation_loss(model: PreTrainedModel, rows: Dataset, batch_size: int, **arguments: Any) -> float:
    """Computes a model's loss, without the load-balancing loss that training adds.

    Args:
        model (`PreTrainedModel`): The model; left in training mode.
        rows (`Dataset`): Rows of equal length.
        batch_size (`int`): Rows in a batch.
        arguments: Further arguments of the model, such as `mixing`.

    Returns:
        `float`: Mean cross-entropy in nats per token.
    """
    model.eval()
    total = 0.0
    for batch in rows.iter(batch_size):
        ids = batch["input_ids"].to(model.device)
        total += model(ids, labels=ids, output_router_logits=False, use_cache=False, **arguments).loss.item() * len(
            ids
        )
    model.train()
    return total / len(rows)


class ValidationCurve(TrainerCallback):
    """Evaluates the model every `eval_steps` steps, and at the end. A resumed run has the curve from its start.

    Args:
        rows (`Dataset`): Validation rows.
    """

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.minutes: list[float] = []  # since the evaluation before
        self.evaluated_at = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the evaluations from the history of a run that is resumed."""
        history = [entry for entry in state.log_history if "validation_loss" in entry]
        self.steps = [int(entry["step"]) for entry in history]
        self.losses = [entry["validation_loss"] for entry in history]
        self.minutes = [entry["minutes"] for entry in history]
        self.evaluated_at = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate after some steps."""
        if state.global_step % int(args.eval_steps or state.max_steps) and state.global_step != state.max_steps:
            return
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            loss = validation_loss(kwargs["model"], self.rows, args.per_device_eval_batch_size)
        now = time.perf_counter()
        self.steps.append(state.global_step)
        self.losses.append(loss)
        self.minutes.append((now - self.evaluated_at) / 60)
        self.evaluated_at = now
        entry = {"step": state.global_step, "validation_loss": loss, "minutes": self.minutes[-1]}
        state.log_history.append(entry)


def train_model(
    model: PreTrainedModel, training_args: TrainingArguments, text: DatasetDict, **changes: Any
) -> dict[str, Any]:
    """Trains a model with the stock `Trainer`.

    Args:
        model (`PreTrainedModel`): The model.
        training_args (`TrainingArguments`): Arguments that all runs share; `eval_steps` is how often to evaluate.
        text (`DatasetDict`): Rows of [`load_text`].
        changes: Fields of `TrainingArguments` in which this run differs.

    Returns:
        `dict`: `changes`, the number of training rows, and `steps` and `losses` of the evaluations.
    """
    run_args = dataclasses.replace(training_args, **changes)
    curve = ValidationCurve(text["validation"])
    trainer = Trainer(model, run_args, collate_rows, text["train"], callbacks=[curve])
    trainer.train()
    return {**changes, "num_rows": len(text["train"]), "steps": curve.steps, "losses": curve.losses}


def make_step(model: PreTrainedModel, training_args: TrainingArguments, ids: Tensor) -> Callable[[], None]:
    """Makes a training step like the `Trainer`'s, to be timed on its own.

    Args:
        model (`PreTrainedModel`): The model.
        training_args (`TrainingArguments`): Precision, clipping and optimizer (fused AdamW).
        ids (`torch.Tensor` of shape `[B, T]`): The batch.

    Returns:
        `Callable`: Takes a step.
    """
    model = model.to(training_args.device)
    ids = ids.to(model.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    forward = torch.compile(model) if training_args.torch_compile else model

    def step() -> None:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=training_args.bf16):
            loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training_args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step
