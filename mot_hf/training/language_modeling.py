"""Pretraining of causal and masked MoT language models."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from datasets import Dataset, DatasetDict, IterableDataset
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import IntervalStrategy

from mot_hf.corpus import PAD_TOKEN, load_corpus, make_blocks, spread_rows, train_tokenizer
from mot_hf.metrics import LanguageModelMetrics
from mot_hf.modeling import MoTConfig, MoTForCausalLM, MoTForMaskedLM
from mot_hf.training.arguments import CorpusArguments, MethodArguments, ModelArguments
from mot_hf.training.checkpoints import find_checkpoint
from mot_hf.training.lora import add_lora
from mot_hf.training.run import add_callbacks, run_training
from mot_hf.training.safety import explain_failures

# Documents that a tokenizer is trained on; a stream may have no end.
_MAX_TOKENIZER_DOCUMENTS = 20_000


@dataclass
class LanguageData:
    """Rows of tokens, and the tokenizer that made them.

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
    masked: bool,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trainer:
    """Trains a MoT language model and saves it, with its tokenizer, in `training_args.output_dir`.

    Args:
        model_args ([`ModelArguments`]): Architecture, or the checkpoint to train further.
        corpus_args ([`CorpusArguments`]): Text, tokenizer and rows.
        training_args (`TrainingArguments`): Those of the stock `Trainer`. `train_sampling_strategy="sequential"` keeps
            the order in which neighbours in the text share no group. See [`find_checkpoint`] for
            `resume_from_checkpoint`.
        method_args ([`MethodArguments`], *optional*): Monitoring, transition tuning, adapters.
        masked (`bool`): Whether to train a masked language model instead of a causal one.
        callbacks (`Sequence[TrainerCallback]`, *optional*): Callbacks of the trainer, besides its own.

    Returns:
        `Trainer`: The trainer after training, for its model and its log.

    Raises:
        ValueError: An argument does not fit, or `output_dir` holds checkpoints and says not what to do with them.
        OSError: Text or model cannot be read, or a checkpoint cannot be written.
        FloatingPointError: The loss or a parameter is no finite number.
    """
    method_args = method_args or MethodArguments()
    checkpoint = find_checkpoint(training_args)
    set_seed(training_args.seed)
    with explain_failures(training_args), training_args.main_process_first(desc="reading the text"):
        data = _load_data(model_args, corpus_args, training_args.seed)
    _check_evaluation(training_args, corpus_args, len(data.validation))
    model = _make_model(model_args, data.tokenizer, corpus_args.block_length, masked)
    if method_args.lora_rank:
        task_type = None if masked else "CAUSAL_LM"
        model = add_lora(model, rank=method_args.lora_rank, alpha=method_args.lora_alpha, task_type=task_type)
    metrics = _make_metrics(data.tokenizer, masked)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=DataCollatorForLanguageModeling(
            data.tokenizer, mlm=masked, mlm_probability=corpus_args.mlm_probability
        ),
        processing_class=data.tokenizer,
        compute_metrics=metrics.compute_metrics,
        preprocess_logits_for_metrics=metrics.preprocess_logits,
        callbacks=list(callbacks),
    )
    add_callbacks(trainer, method_args)
    run_training(trainer, checkpoint, corpus_args.text_name())
    return trainer


def _load_data(model_args: ModelArguments, args: CorpusArguments, seed: int) -> LanguageData:
    corpus = load_corpus(
        args.source, config_name=args.config_name, text_column=args.text_column, streaming=args.streaming
    )
    tokenizer_name = args.tokenizer or model_args.model_name_or_path
    if tokenizer_name:
        tokenizer = _load_tokenizer(tokenizer_name)
    else:
        documents = (row["text"] for row in islice(corpus["train"], _MAX_TOKENIZER_DOCUMENTS))
        tokenizer = train_tokenizer(documents, args.vocab_size)
    group_size = model_args.group_size
    if model_args.model_name_or_path:
        group_size = AutoConfig.from_pretrained(model_args.model_name_or_path).group_size
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


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:  # the end token instead would be left out of the loss
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    if tokenizer.eos_token is None:  # BERT's tokenizers end a text with their separator
        tokenizer.eos_token = tokenizer.sep_token
    return tokenizer


def _make_metrics(tokenizer: PreTrainedTokenizerBase, masked: bool) -> LanguageModelMetrics:
    try:
        return LanguageModelMetrics(tokenizer, masked=masked)
    except ValueError:  # no byte-level tokenizer, so there are no bits per byte
        return LanguageModelMetrics(masked=masked)


def _check_evaluation(args: TrainingArguments, corpus_args: CorpusArguments, num_rows: int) -> None:
    """The `Trainer` drops the last batch of an evaluation too, and logs no loss where that was the only one."""
    batch_size = args.eval_batch_size * args.world_size
    if args.eval_strategy != IntervalStrategy.NO and args.dataloader_drop_last and num_rows < batch_size:
        raise ValueError(
            f"There are {num_rows} validation rows (`max_eval_rows={corpus_args.max_eval_rows}`), less than one batch "
            f"of {batch_size}, which dataloader_drop_last drops: lower per_device_eval_batch_size, or evaluate more."
        )


def _make_model(
    args: ModelArguments, tokenizer: PreTrainedTokenizerBase, block_length: int, masked: bool
) -> MoTForCausalLM | MoTForMaskedLM:
    head = MoTForMaskedLM if masked else MoTForCausalLM
    if args.model_name_or_path:
        return head.from_pretrained(args.model_name_or_path, **args.config_fields())
    config = MoTConfig(
        **args.config_fields(),
        vocab_size=len(tokenizer),
        max_position_embeddings=block_length,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return head(config)
