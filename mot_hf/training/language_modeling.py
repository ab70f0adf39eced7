"""Pretraining of causal and masked MoT language models."""

from collections.abc import Sequence
from dataclasses import asdict

from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from mot_hf.corpus import load_corpus, make_blocks, train_tokenizer
from mot_hf.modeling import MoTConfig, MoTForCausalLM, MoTForMaskedLM
from mot_hf.training.arguments import CorpusArguments, ModelArguments


def train_language_model(
    model_args: ModelArguments,
    corpus_args: CorpusArguments,
    training_args: TrainingArguments,
    *,
    masked: bool,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trainer:
    """Trains a MoT language model from scratch and saves it, with its tokenizer, in `training_args.output_dir`.

    Args:
        model_args ([`ModelArguments`]): Architecture.
        corpus_args ([`CorpusArguments`]): Text, tokenizer and rows.
        training_args (`TrainingArguments`): Those of the stock `Trainer`. `train_sampling_strategy="sequential"` keeps
            the order in which neighbours in the text share no group.
        masked (`bool`): Whether to train a masked language model instead of a causal one.
        callbacks (`Sequence[TrainerCallback]`, *optional*): Callbacks of the trainer, besides its own.

    Returns:
        `Trainer`: The trainer after training, for its model and its log.
    """
    set_seed(training_args.seed)
    corpus = load_corpus(corpus_args.source)
    tokenizer = train_tokenizer(corpus["train"]["text"], corpus_args.vocab_size)
    rows = make_blocks(
        corpus,
        tokenizer,
        block_length=corpus_args.block_length,
        group_size=model_args.group_size,
        seed=training_args.seed,
    )
    num_eval_rows = min(corpus_args.max_eval_rows, len(rows["validation"]))
    trainer = Trainer(
        model=_make_model(model_args, tokenizer, corpus_args.block_length, masked),
        args=training_args,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"].select(range(num_eval_rows)),
        data_collator=DataCollatorForLanguageModeling(
            tokenizer, mlm=masked, mlm_probability=corpus_args.mlm_probability
        ),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    trainer.train()
    trainer.save_model()
    return trainer


def _make_model(
    args: ModelArguments, tokenizer: PreTrainedTokenizerBase, block_length: int, masked: bool
) -> MoTForCausalLM | MoTForMaskedLM:
    config = MoTConfig(
        **asdict(args),
        vocab_size=len(tokenizer),
        max_position_embeddings=block_length,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return (MoTForMaskedLM if masked else MoTForCausalLM)(config)
