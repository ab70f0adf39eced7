"""Pretraining of causal and masked MoT language models."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import (
    AutoConfig,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import IntervalStrategy

from mot_hf.data.blocks import RowCollator, make_blocks, spread_rows
from mot_hf.data.corpus import load_corpus
from mot_hf.data.tokenizer import train_tokenizer
from mot_hf.metrics import LanguageModelMetrics
from mot_hf.modeling import MoTConfig, MoTForCausalLM, MoTForMaskedLM
from mot_hf.storage.checkpoints import find_checkpoint
from mot_hf.training.arguments import CorpusArguments, MethodArguments, ModelArguments
from mot_hf.training.checks import check_metric, check_run
from mot_hf.training.lora import add_lora, refuse_adapters
from mot_hf.training.parallelism import check_layout, keep_shards, make_layout, resumable, spread_model
from mot_hf.training.resuming import (
    TRANSITION_FIELDS,
    CheckpointDescription,
    check_adapters,
    check_arguments,
    check_settings,
    check_transition,
)
from mot_hf.training.run import add_callbacks, lock_run, run_training
from mot_hf.training.safety import explain_failures
from mot_hf.training.tokenizer_choice import find_tokenizer
from mot_hf.training.vocabulary import count_tokens, enlarge_embeddings, find_new_tokens

logger = logging.getLogger(__name__)

# Limit on the documents to train a tokenizer on, as a stream may be endless.
_MAX_TOKENIZER_DOCUMENTS = 20_000
DEFAULT_VOCAB_SIZE = 4096
_METRICS = ("loss", "token_loss", "perplexity", "accuracy", "bits_per_byte")


@dataclass
class LanguageData:
    """Rows of tokens, and the tokenizer that was used for them.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        train (`Dataset` or `IterableDataset`): Training rows.
        validation (`Dataset`): Validation rows.
    """

    tokenizer: PreTrainedTokenizerBase
    train: Dataset | IterableDataset
    validation: Dataset


def train_language_model(
    model_args: ModelArguments,
    corpus_args: CorpusArguments,
    training_args: TrainingArguments,
    method_args: MethodArguments | None = None,
    *,
    masked: bool | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trainer:
    """Trains a MoT language model and saves it with its tokenizer in `training_args.output_dir`.

    Args:
        model_args ([`ModelArguments`]): Architecture of a new model, or the checkpoint to train further.
        corpus_args ([`CorpusArguments`]): Text, tokenizer and rows.
        training_args (`TrainingArguments`): Arguments of the stock `Trainer`. `train_sampling_strategy="sequential"`
            keeps the order of the rows, in which neighbours in the text are never in the same group. See
            [`find_checkpoint`] for `resume_from_checkpoint`.
        method_args ([`MethodArguments`], *optional*): Monitoring, early stopping, transition tuning, balancing,
            adapters, and how the model is spread over processes.
        masked (`bool`, *optional*): Whether to train a masked language model instead of a causal one. By default what
            `model_args.masked` says, else what the checkpoint is.
        callbacks (`Sequence[TrainerCallback]`, *optional*): Additional callbacks for the trainer.

    Returns:
        `Trainer`: The trainer after training, with the model and the log.

    Raises:
        ValueError: An argument is invalid or does not fit the checkpoint to train further or to resume from, or
            `output_dir` has checkpoints and the arguments do not say what to do with them.
        OSError: Text or model cannot be read, a checkpoint cannot be written, or another run is writing to the folder.
        FloatingPointError: The loss or a parameter is not finite.
    """
    method_args = method_args or MethodArguments()
    check_run(training_args, method_args)
    check_metric(training_args, _METRICS)
    if corpus_args.block_length < 2:
        raise ValueError(f"`block_length={corpus_args.block_length}` must be at least 2: one token predicts nothing.")
    if model_args.model_name_or_path:
        refuse_adapters(model_args.model_name_or_path)
    masked = find_masked(model_args, masked)
    with lock_run(training_args):
        return _train(model_args, corpus_args, training_args, method_args, masked, callbacks)


def tune_transition(
    model_args: ModelArguments,
    corpus_args: CorpusArguments,
    training_args: TrainingArguments,
    method_args: MethodArguments,
) -> Trainer:
    """Trains a finished MoT language model further in another mode (transition tuning), from the first step on.

    Args:
        model_args ([`ModelArguments`]): The checkpoint.
        corpus_args ([`CorpusArguments`]): Text and rows.
        training_args (`TrainingArguments`): Arguments of the stock `Trainer`.
        method_args ([`MethodArguments`]): Its `transition_share`, if set, is the share of the steps before the switch,
            and its `transition_mode` the mode after it.

    Returns:
        `Trainer`: The trainer after training.

    Raises:
        ValueError: There is no checkpoint, or as in [`train_language_model`].
    """
    if not model_args.model_name_or_path:
        raise ValueError("`model_name_or_path` is not given: set it to the MoT model to tune.")
    method_args.transition_share = method_args.transition_share or 0.0
    return train_language_model(model_args, corpus_args, training_args, method_args)


def find_masked(args: ModelArguments, masked: bool | None) -> bool:
    """Whether the model is a masked one: as the command says, the arguments, or the checkpoint."""
    if None not in (masked, args.masked) and masked != args.masked:
        raise ValueError(f"`masked={args.masked}` is not what this command trains: use the one for the other kind.")
    masked = args.masked if masked is None else masked
    if masked is None and args.model_name_or_path:
        masked = AutoConfig.from_pretrained(args.model_name_or_path).architectures == ["MoTForMaskedLM"]
    return bool(masked)


def _train(
    model_args: ModelArguments,
    corpus_args: CorpusArguments,
    training_args: TrainingArguments,
    method_args: MethodArguments,
    masked: bool,
    callbacks: Sequence[TrainerCallback],
) -> Trainer:
    layout = make_layout(method_args, training_args)
    if method_args.lora_rank and not model_args.model_name_or_path:
        raise ValueError(
            f"`lora_rank={method_args.lora_rank}` trains adapters of a trained model, and only they are saved: give "
            "the model as --model_name_or_path, or leave lora_rank out."
        )
    checkpoint = find_checkpoint(training_args)
    set_seed(training_args.seed)
    config = make_config(model_args, corpus_args.block_length)
    if layout:
        check_layout(layout, config, training_args)
    tokenizer = find_tokenizer(model_args, corpus_args, config, checkpoint, masked)
    head = MoTForMaskedLM if masked else MoTForCausalLM
    if checkpoint and tokenizer:
        _set_vocabulary(config, tokenizer, is_new=not model_args.model_name_or_path)
        changing = {"is_causal"} if method_args.transition_share is None else {"is_causal", *TRANSITION_FIELDS}
        check_settings(config, head.__name__, checkpoint, changing=changing)
        check_transition(config, training_args, method_args, checkpoint)
        check_adapters(method_args.lora_rank, method_args.lora_alpha, checkpoint)
        check_arguments(training_args, checkpoint)
    with explain_failures(training_args), training_args.main_process_first(desc="reading the text"):
        data = _load_data(corpus_args, tokenizer, config.group_size, training_args.seed)
    _fit_evaluation(training_args, corpus_args, len(data.validation), training_args.world_size // method_args.tp_size)
    make = partial(_make_model, head, model_args, config, data.tokenizer)
    model = spread_model(head, make, layout, training_args, checkpoint) if layout else make()
    if method_args.lora_rank:
        task_type = None if masked else "CAUSAL_LM"
        new_tokens = find_new_tokens(data.tokenizer, str(model_args.model_name_or_path))
        sizes = {"rank": method_args.lora_rank, "alpha": method_args.lora_alpha}
        model = cast(Any, add_lora(model, task_type=task_type, new_tokens=new_tokens, **sizes))
    metrics = _make_metrics(data.tokenizer, masked)
    with resumable(training_args, layout):
        trainer = Trainer(
            model=model,
            args=training_args,
            train_dataset=data.train,
            eval_dataset=data.validation,
            data_collator=RowCollator(data.tokenizer, mlm=masked, mlm_probability=corpus_args.mlm_probability),
            processing_class=data.tokenizer,
            compute_metrics=metrics.compute_metrics,
            preprocess_logits_for_metrics=metrics.preprocess_logits,
            callbacks=[*callbacks, CheckpointDescription(model.config, head.__name__, data.tokenizer)],
        )
    keep_shards(trainer, layout, checkpoint)
    add_callbacks(trainer, method_args, num_columns=corpus_args.block_length)
    run_training(trainer, checkpoint, corpus_args.text_name(), corpus_args.text())
    return trainer


def _load_data(
    args: CorpusArguments, tokenizer: PreTrainedTokenizerBase | None, group_size: int, seed: int
) -> LanguageData:
    corpus = load_corpus(
        args.source,
        validation_source=args.validation_source,
        validation_fraction=args.validation_fraction,
        config_name=args.config_name,
        text_column=args.text_column,
        streaming=args.streaming,
    )
    if tokenizer is None:
        documents = (row["text"] for row in islice(corpus["train"], _MAX_TOKENIZER_DOCUMENTS))
        tokenizer = train_tokenizer(documents, args.vocab_size or DEFAULT_VOCAB_SIZE, chat_template=args.chat_template)
    rows = make_blocks(
        corpus,
        tokenizer,
        block_length=args.block_length,
        group_size=group_size,
        seed=seed,
        buffer_size=args.buffer_size,
    )
    if isinstance(rows, DatasetDict):
        num_eval_rows = min(args.max_eval_rows, len(rows["validation"]))
        return LanguageData(tokenizer, rows["train"], rows["validation"].select(range(num_eval_rows)))
    taken = Dataset.from_list(list(rows["validation"].take(args.max_eval_rows)))
    return LanguageData(tokenizer, rows["train"], taken.select(spread_rows(len(taken), group_size, seed)))


def make_config(args: ModelArguments, block_length: int) -> MoTConfig:
    """The model's configuration, except for the fields that depend on the tokenizer."""
    if not args.model_name_or_path:
        config = MoTConfig(**{"max_position_embeddings": block_length, **args.config_fields()})
        if config.max_position_embeddings < block_length:
            raise ValueError(
                f"`max_position_embeddings={config.max_position_embeddings}` is less than "
                f"`block_length={block_length}`: the rows would be longer than the model is meant for."
            )
        return config
    config: Any = AutoConfig.from_pretrained(args.model_name_or_path, **args.config_fields())
    if config.model_type != MoTConfig.model_type:
        raise ValueError(
            f"`model_name_or_path={args.model_name_or_path!r}` is a model of type {config.model_type!r}, not a MoT "
            "model: convert a dense Qwen3 model with `mot upcycle`."
        )
    args.check_checkpoint(config)
    if block_length > config.max_position_embeddings:
        logger.warning(
            "Rows of `block_length=%d` tokens are longer than the rows that `model_name_or_path=%r` was trained on: "
            "set --block_length to %d or less.",
            block_length,
            args.model_name_or_path,
            config.max_position_embeddings,
        )
    return config


def _set_vocabulary(config: MoTConfig, tokenizer: PreTrainedTokenizerBase, *, is_new: bool) -> None:
    num_tokens = count_tokens(tokenizer)
    config.vocab_size = num_tokens if is_new else max(num_tokens, config.vocab_size)
    config.pad_token_id = cast(int | None, tokenizer.pad_token_id)
    config.eos_token_id = cast(int | None, tokenizer.eos_token_id)


def _make_metrics(tokenizer: PreTrainedTokenizerBase, masked: bool) -> LanguageModelMetrics:
    try:
        return LanguageModelMetrics(tokenizer, masked=masked)
    except ValueError:  # without a byte-level tokenizer, there are no bits per byte
        return LanguageModelMetrics(masked=masked)


def _fit_evaluation(args: TrainingArguments, corpus_args: CorpusArguments, num_rows: int, num_processes: int) -> None:
    """Evaluate in smaller batches if there is no full one: the `Trainer` would drop the only batch and log no loss."""
    batch_size = args.eval_batch_size * num_processes
    if args.eval_strategy == IntervalStrategy.NO or not args.dataloader_drop_last or num_rows >= batch_size:
        return
    num_devices = batch_size // args.per_device_eval_batch_size
    if num_rows < num_devices:
        raise ValueError(
            f"There are {num_rows} validation rows (`max_eval_rows={corpus_args.max_eval_rows}`), fewer than the "
            f"{num_devices} devices: give more text, or a larger --validation_fraction."
        )
    logger.warning(
        "There are only %d validation rows: `per_device_eval_batch_size` is %d in place of %d.",
        num_rows,
        num_rows // num_devices,
        args.per_device_eval_batch_size,
    )
    args.per_device_eval_batch_size = num_rows // num_devices


def _make_model(
    head: type[MoTForCausalLM] | type[MoTForMaskedLM],
    args: ModelArguments,
    config: MoTConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> MoTForCausalLM | MoTForMaskedLM:
    if args.model_name_or_path:
        # Steps are often too small for weights of 16 bits; `bf16` computes in them.
        model = head.from_pretrained(args.model_name_or_path, dtype=torch.float32, **args.config_fields())
        enlarge_embeddings(model, tokenizer)
        return model
    _set_vocabulary(config, tokenizer, is_new=True)
    return head(config)
