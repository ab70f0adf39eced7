"""Fine-tuning of pretrained MoT models for sequence and token classification."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

from mot_hf.data.classification import IGNORED, ClassificationArguments, encode, load_classification_data
from mot_hf.storage.checkpoints import find_checkpoint
from mot_hf.training.arguments import MethodArguments
from mot_hf.training.checks import check_metric, check_run, refuse_modes
from mot_hf.training.lora import add_lora, refuse_adapters
from mot_hf.training.parallelism import check_is_whole
from mot_hf.training.resuming import CheckpointDescription, check_resumed
from mot_hf.training.run import add_callbacks, fill_batches, lock_run, run_training
from mot_hf.training.vocabulary import enlarge_embeddings

logger = logging.getLogger(__name__)

_METRICS = ("loss", "accuracy", "macro_f1")


def finetune_classification(
    model_name_or_path: str,
    data: DatasetDict,
    training_args: TrainingArguments,
    method_args: MethodArguments | None = None,
    *,
    mixing: str | None = None,
    text_name: str | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trainer:
    """Fine-tunes a pretrained model on labelled texts and saves it with its tokenizer in `training_args.output_dir`.

    Texts are truncated to the model's maximum length and padded on the right. A MoT model is trained in mode
    `config.mixing` and evaluated in mode `config.inference_mixing`. In mode `cross_example`, the rows of a group
    should be unrelated, so that a row's companions do not reveal its label. Both splits are therefore shuffled once,
    and `train_sampling_strategy="random"` shuffles the training split again in every epoch. `"group_by_length"` saves
    padding, but then the last batches, which have the most weight in the statistics of the typical group, are not
    typical. Training texts beyond the last full batch are dropped; all validation texts are used.

    Args:
        model_name_or_path (`str`): A pretrained model with a tokenizer, either MoT or dense.
        data (`DatasetDict`): Texts, as returned by [`load_classification_data`].
        training_args (`TrainingArguments`): Arguments of the stock `Trainer`.
        method_args ([`MethodArguments`], *optional*): Monitoring, early stopping and adapters.
        mixing (`str`, *optional*): Mixing mode for training, if not that of the model's configuration.
        text_name (`str`, *optional*): Name of the texts in the model card.
        callbacks (`Sequence[TrainerCallback]`, *optional*): Additional callbacks for the trainer.

    Returns:
        `Trainer`: The trainer after training. Its `evaluate()` returns accuracy and macro F1 on the validation split.

    Raises:
        ValueError: If there are fewer than two labels, the tokenizer cannot pad or return offsets,
            `dataloader_drop_last` or a size of parallelism is set, the checkpoint to resume from has different labels,
            settings or tokens, or `output_dir` has checkpoints and the arguments do not say what to do with them.
        OSError: If the model cannot be read or written, or another run is writing to the folder.
        FloatingPointError: If the loss or a parameter is not finite.
    """
    if training_args.dataloader_drop_last:
        raise ValueError(
            "`dataloader_drop_last=True` would drop validation texts too: set it to False. Training texts beyond the "
            "last full batch are dropped anyway."
        )
    if training_args.batch_eval_metrics:
        raise ValueError(
            "`batch_eval_metrics=True` would add up metrics batch by batch, but F1 is of all texts together: leave it "
            "out. Only the predicted labels are kept."
        )
    method_args = method_args or MethodArguments()
    check_is_whole(method_args, "Classifiers")
    check_run(training_args, method_args)
    check_metric(training_args, _METRICS)
    with lock_run(training_args):
        return _finetune(model_name_or_path, data, training_args, method_args, mixing, text_name, callbacks)


def finetune_and_evaluate(
    args: ClassificationArguments, training_args: TrainingArguments, method_args: MethodArguments
) -> dict[str, float]:
    """Loads texts, fine-tunes a model on them, evaluates it and writes the metrics to the output folder.

    Args:
        args ([`ClassificationArguments`]): Model, task and texts.
        training_args (`TrainingArguments`): Arguments of the stock `Trainer`.
        method_args ([`MethodArguments`]): Monitoring, early stopping and adapters.

    Returns:
        `dict[str, float]`: The metrics on the validation split.

    Raises:
        ValueError: As in [`load_classification_data`] and [`finetune_classification`].
        OSError: Likewise.
    """
    check_run(training_args, method_args)
    check_metric(training_args, _METRICS)
    with training_args.main_process_first(desc="reading the texts"):
        data = load_classification_data(args)
    names = {"mixing": args.mixing, "text_name": args.text_name()}
    trainer = finetune_classification(args.model_name_or_path, data, training_args, method_args, **names)
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    return metrics


def _finetune(
    model_name_or_path: str,
    data: DatasetDict,
    training_args: TrainingArguments,
    method_args: MethodArguments,
    mixing: str | None,
    text_name: str | None,
    callbacks: Sequence[TrainerCallback],
) -> Trainer:
    refuse_adapters(model_name_or_path)
    settings = _find_settings(model_name_or_path, mixing)
    checkpoint = find_checkpoint(training_args)
    set_seed(training_args.seed)
    of_tokens = "starts" in data["train"].column_names
    tokenizer = _load_tokenizer(model_name_or_path, of_tokens)
    model = _load_model(model_name_or_path, _label_names(data), tokenizer, of_tokens, settings)
    if checkpoint:
        check_resumed(model, tokenizer, training_args, method_args, checkpoint)
    tokenizer.model_max_length = model.config.max_position_embeddings
    architecture = type(model).__name__
    if method_args.lora_rank:
        task_type = "TOKEN_CLS" if of_tokens else "SEQ_CLS"
        model = add_lora(model, rank=method_args.lora_rank, alpha=method_args.lora_alpha, task_type=task_type)
    encoded = encode(data, tokenizer, tokenizer.model_max_length).shuffle(seed=training_args.seed)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=fill_batches(encoded["train"], training_args),
        eval_dataset=encoded["validation"],
        data_collator=(DataCollatorForTokenClassification if of_tokens else DataCollatorWithPadding)(tokenizer),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=_most_likely,
        callbacks=[*callbacks, CheckpointDescription(model.config, architecture, tokenizer)],
    )
    add_callbacks(trainer, method_args)
    run_training(trainer, checkpoint, text_name)
    return trainer


def _find_settings(model_name_or_path: str, mixing: str | None) -> dict[str, str]:
    """The fields to load a model with, for a mode of training."""
    if mixing is None:
        return {}
    refuse_modes(AutoConfig.from_pretrained(model_name_or_path), mixing)
    return {"mixing": mixing}


def _label_names(data: DatasetDict) -> list[str]:
    features = data["train"].features
    names = features["labels"].feature.names if "labels" in features else features["label"].names
    if len(names) < 2:
        raise ValueError(
            f"`data` has the labels {names}, but classification needs at least two: add texts with other labels."
        )
    return names


def _load_tokenizer(model_name_or_path: str, of_tokens: bool) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, padding_side="right", truncation_side="right")
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"The tokenizer of `model_name_or_path={model_name_or_path!r}` has no padding token: set "
            "`tokenizer.pad_token` to a token that does not occur in the texts, and save the tokenizer."
        )
    if of_tokens and not tokenizer.is_fast:
        raise ValueError(
            f"The tokenizer of `model_name_or_path={model_name_or_path!r}` cannot return the positions of its tokens "
            "in the text: token classification needs a fast tokenizer."
        )
    return tokenizer


def _load_model(
    model_name_or_path: str,
    names: list[str],
    tokenizer: PreTrainedTokenizerBase,
    of_tokens: bool,
    settings: dict[str, str],
) -> PreTrainedModel:
    head = AutoModelForTokenClassification if of_tokens else AutoModelForSequenceClassification
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    fields = {**labels, **settings}
    verbosity = get_verbosity()
    set_verbosity_error()  # a table of the differences between any two heads
    try:
        model, info = head.from_pretrained(model_name_or_path, dtype=torch.float32, output_loading_info=True, **fields)
    finally:
        set_verbosity(verbosity)
    new, unused = (", ".join(sorted(info[kind])) or "nothing" for kind in ("missing_keys", "unexpected_keys"))
    logger.warning("Of %r everything is kept but %s; new for this task is %s.", model_name_or_path, unused, new)
    enlarge_embeddings(model, tokenizer)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def _most_likely(logits: Tensor, labels: Tensor) -> Tensor:
    """The predicted labels [...]; the logits [..., L] are not kept."""
    return logits.argmax(dim=-1)


def _flatten(labels: Any) -> np.ndarray:
    """All labels [N], of one array or of one for each batch."""
    return np.concatenate([np.ravel(batch) for batch in (labels if isinstance(labels, list) else [labels])])


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Compares predicted labels with true labels, and ignores positions without a true label.

    Args:
        prediction (`EvalPrediction`): Predicted and true labels, of the same shape, or lists of such of each batch;
            -100 means no label.

    Returns:
        `dict[str, float]`: `accuracy`, and `macro_f1`, the mean F1 over all labels that occur among the true or the
        predicted ones.
    """
    predicted, true = _flatten(prediction.predictions), _flatten(prediction.label_ids)
    counted = true != IGNORED
    predicted, true = predicted[counted], true[counted]
    num_labels = 1 + max(predicted.max(), true.max())
    right, num_predicted, num_true = (
        np.bincount(labels, minlength=num_labels) for labels in (true[predicted == true], predicted, true)
    )
    total = num_predicted + num_true
    f1 = 2 * right[total > 0] / total[total > 0]
    return {"accuracy": float((predicted == true).mean()), "macro_f1": float(f1.mean())}
