"""Tuning of causal language models on conversations, with TRL. Importing this module needs the extra `sft`."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, cast

import torch
from datasets import DatasetDict
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import IntervalStrategy
from trl import SFTConfig, SFTTrainer

from mot_hf.data.chat import CHAT_TOKENS, END_OF_TURN_TOKEN, add_chat_template
from mot_hf.data.instructions import InstructionArguments, load_instruction_data
from mot_hf.data.progress import hide_bars
from mot_hf.data.sources import count
from mot_hf.modeling import MoTConfig
from mot_hf.storage.checkpoints import find_checkpoint
from mot_hf.training.arguments import MethodArguments
from mot_hf.training.checks import check_metric, check_run, refuse_modes
from mot_hf.training.lora import add_lora, refuse_adapters
from mot_hf.training.parallelism import check_is_whole
from mot_hf.training.resuming import CheckpointDescription, check_resumed
from mot_hf.training.run import add_callbacks, fill_batches, lock_run, run_training
from mot_hf.training.safety import explain_failures
from mot_hf.training.vocabulary import complete_tokenizer, enlarge_embeddings, load_tokenizer

logger = logging.getLogger(__name__)

_OF_TRL = {each.name: each for each in fields(SFTConfig)}
_METRICS = ("loss", "entropy", "mean_token_accuracy", "num_tokens", "aux_loss")  # those of TRL's evaluations


def _with_default(name: str, value: Any) -> Any:
    """A field of TRL's arguments with another default."""
    return field(default=value, metadata=_OF_TRL[name].metadata)


@dataclass
class SFTArguments(SFTConfig):
    """Arguments of TRL's `SFTTrainer`, with defaults for conversations, and otherwise those of the stock `Trainer`.

    The loss is that of the assistant's answers. Rows are as long as the model's maximum unless `max_length` is set.
    Packing, if asked for, is `"wrapped"`. Neither bfloat16 nor gradient checkpointing is on by itself.
    """

    _argument_group_name = "the trainer, TRL's SFTTrainer"

    assistant_only_loss: bool = _with_default("assistant_only_loss", True)
    max_length: int | None = _with_default("max_length", None)
    packing_strategy: str = _with_default("packing_strategy", "wrapped")
    bf16: bool = _with_default("bf16", False)
    gradient_checkpointing: bool | None = _with_default("gradient_checkpointing", None)


def tune_on_instructions(
    args: InstructionArguments,
    training_args: SFTConfig,
    method_args: MethodArguments | None = None,
    *,
    callbacks: Sequence[TrainerCallback] = (),
) -> SFTTrainer:
    """Tunes a causal language model on conversations and saves it with its tokenizer in `training_args.output_dir`.

    A tokenizer without a chat template gets the one of this package with its tokens, and the model gets embeddings for
    them. Its generation settings then end an answer at the end of a turn.

    A MoT model in mode `cross_example` is trained in mode `per_sequence` if the batches do not fill its groups, unless
    `args.mixing` says otherwise: it learns about as much from them and computes less. The load-balancing loss, which
    TRL adds to the loss of any model with experts, is left out unless the model itself or `training_args` asks for it.

    Args:
        args ([`InstructionArguments`]): Model and conversations.
        training_args ([`SFTArguments`] or `trl.SFTConfig`): Arguments of TRL's `SFTTrainer`.
        method_args ([`MethodArguments`], *optional*): Monitoring, early stopping and adapters.
        callbacks (`Sequence[TrainerCallback]`, *optional*): Additional callbacks for the trainer.

    Returns:
        `SFTTrainer`: The trainer after training.

    Raises:
        ValueError: An argument is invalid or does not fit the model or the checkpoint to resume from, the data are no
            conversations, or `output_dir` has checkpoints and the arguments do not say what to do with them.
        OSError: Data or model cannot be read, a checkpoint cannot be written, or another run is writing to the folder.
        FloatingPointError: The loss or a parameter is not finite.
    """
    method_args = method_args or MethodArguments()
    check_run(training_args, method_args)
    check_metric(training_args, _METRICS)
    check_is_whole(method_args, "Models that are tuned on conversations")
    if method_args.transition_share is not None:
        raise ValueError(
            f"`transition_share={method_args.transition_share}` is for `mot train`: tune on conversations in one "
            "mode, such as --mixing moe."
        )
    with lock_run(training_args):
        return _tune(args, training_args, method_args, callbacks)


def _tune(
    args: InstructionArguments,
    training_args: SFTConfig,
    method_args: MethodArguments,
    callbacks: Sequence[TrainerCallback],
) -> SFTTrainer:
    refuse_adapters(args.model_name_or_path)
    checkpoint = find_checkpoint(training_args)
    set_seed(training_args.seed)
    config = AutoConfig.from_pretrained(args.model_name_or_path)
    mode = choose_mixing(config, args.mixing, training_args)
    tokenizer = _load_tokenizer(args.model_name_or_path, training_args)
    with explain_failures(training_args), training_args.main_process_first(desc="reading the conversations"):
        data = load_instruction_data(args)
    settings = {"mixing": mode} if mode else {}
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=torch.float32, **settings)
    enlarge_embeddings(model, tokenizer, padded=not method_args.lora_rank)
    _end_turns(model, tokenizer)
    _choose_balancing(model.config, training_args)
    if checkpoint:
        check_resumed(model, tokenizer, training_args, method_args, checkpoint)
    trainer = _make_trainer(model, tokenizer, data, training_args, method_args, callbacks)
    add_callbacks(trainer, method_args)
    run_training(trainer, checkpoint, args.text_name())
    return trainer


def choose_mixing(config: PreTrainedConfig, asked: str | None, training_args: SFTConfig) -> str | None:
    """Chooses the mode in which a model is trained, and refuses rows of several sequences where rows are mixed.

    Args:
        config (`PreTrainedConfig`): Configuration of the model.
        asked (`str`, *optional*): The mode that is asked for.
        training_args (`SFTConfig`): How many rows a batch has, and what is in a row.

    Returns:
        `str` or `None`: The mode; `None` for that of the configuration, and for models that are not MoT.

    Raises:
        ValueError: The model has no modes, or mode `cross_example` would mix rows of several sequences.
    """
    if asked is not None:
        refuse_modes(config, asked)
    if config.model_type != MoTConfig.model_type:
        return None
    num_rows = training_args.per_device_train_batch_size
    if asked is None and config.mixing == "cross_example" and num_rows % config.group_size:
        logger.warning(
            "Batches of %d rows do not fill groups of %d rows (`group_size`): the model is trained in mode "
            "per_sequence. Set --per_device_train_batch_size to a multiple, or --mixing, to train in another one.",
            num_rows,
            config.group_size,
        )
        return "per_sequence"
    is_flat = training_args.padding_free or (training_args.packing and training_args.packing_strategy != "wrapped")
    if is_flat and (asked or config.mixing) == "cross_example":
        name = "padding_free" if training_args.padding_free else "packing_strategy"
        raise ValueError(
            f"`{name}={getattr(training_args, name)!r}` makes one row of several sequences, and mode 'cross_example' "
            "mixes rows: use --packing_strategy wrapped, or --mixing per_sequence."
        )
    return asked


def _load_tokenizer(name: str, training_args: SFTConfig) -> PreTrainedTokenizerBase:
    if (tokenizer := load_tokenizer(name)) is None:
        raise OSError(f"{name!r} has no tokenizer: save the one that the model was trained with there.")
    complete_tokenizer(tokenizer)
    if tokenizer.chat_template is None and training_args.chat_template_path is None:
        num_new = add_chat_template(tokenizer)
        logger.warning("The tokenizer has no chat template: it gets one, with %s.", count(num_new, "new token"))
    if END_OF_TURN_TOKEN in (tokenizer.chat_template or ""):
        tokenizer.eos_token = END_OF_TURN_TOKEN
    return tokenizer


def _end_turns(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """End answers at the end of a turn, and where the model ended before."""
    settings: Any = model.generation_config
    before = settings.eos_token_id
    ends = [tokenizer.eos_token_id, *(before if isinstance(before, list) else [before])]
    settings.eos_token_id = list(dict.fromkeys(end for end in ends if end is not None))
    settings.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id, model.config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id


def _choose_balancing(config: PreTrainedConfig, args: SFTConfig) -> None:
    """Add the load-balancing loss only if the arguments or the model ask for it; TRL adds it by itself."""
    if not hasattr(config, "output_router_logits"):
        return
    if args.router_aux_loss_coef is None:
        args.router_aux_loss_coef = float(config.router_aux_loss_coef) if config.output_router_logits else 0.0
    config.output_router_logits = args.router_aux_loss_coef != 0
    if args.router_aux_loss_coef:
        config.router_aux_loss_coef = args.router_aux_loss_coef


def _make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: DatasetDict,
    training_args: SFTConfig,
    method_args: MethodArguments,
    callbacks: Sequence[TrainerCallback],
) -> SFTTrainer:
    config = model.config
    _set_length(training_args, config)
    coefficient = getattr(config, "router_aux_loss_coef", None)
    described = CheckpointDescription(config, type(model).__name__, tokenizer)
    if method_args.lora_rank:
        vocabulary = tokenizer.get_vocab()
        new = sorted(vocabulary[token] for token in CHAT_TOKENS if token in vocabulary)
        sizes = {"rank": method_args.lora_rank, "alpha": method_args.lora_alpha}
        model = cast(PreTrainedModel, add_lora(model, task_type="CAUSAL_LM", new_tokens=new, **sizes))
        head: Any = model.get_output_embeddings()
        if not hasattr(head, "bias"):
            head.bias = None  # TRL asks for it, but PEFT's wrapper of a layer with new tokens does not show it
    with hide_bars():
        trainer = SFTTrainer(
            model=model,
            args=training_args,
            train_dataset=data["train"],
            eval_dataset=data["validation"],
            processing_class=tokenizer,
            callbacks=[*callbacks, described],
        )
    if coefficient is not None:
        config.router_aux_loss_coef = coefficient  # TRL writes 0 there, which later training in mode moe would take
    # TRL writes a card with every checkpoint, which would count as one that was written by hand.
    trainer.create_model_card = lambda *args, **kwargs: None
    _count_cut(trainer, training_args, config)
    if getattr(config, "mixing", None) == "cross_example":
        trainer.train_dataset = fill_batches(trainer.train_dataset, training_args)
    return trainer


def _require_evaluation(args: SFTConfig, num_rows: int) -> None:
    """Refuse evaluations without a row, which log no loss."""
    if not num_rows:
        raise ValueError(
            f"No answer of the held-out conversations begins within `max_length={args.max_length}` tokens: set it "
            "higher, or `eval_strategy` to no."
        )
    if args.dataloader_drop_last and num_rows < args.eval_batch_size * args.world_size:
        raise ValueError(
            f"`dataloader_drop_last=True` leaves nothing of the {num_rows} held-out conversations: set it to False, "
            "or `per_device_eval_batch_size` lower."
        )


def _find_longest(config: PreTrainedConfig) -> int | None:
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _set_length(args: SFTConfig, config: PreTrainedConfig) -> None:
    longest = _find_longest(config)
    if args.max_length is None:
        # TRL cuts no rows that it flattens, and refuses to be told to.
        args.max_length = None if args.padding_free and not args.packing else longest
    elif longest is not None and args.max_length > longest:
        logger.warning(
            "Rows of `max_length=%d` tokens are longer than the rows that the model is meant for: set --max_length to "
            "%d or less.",
            args.max_length,
            longest,
        )


def _count_cut(trainer: SFTTrainer, args: SFTConfig, config: PreTrainedConfig) -> None:
    """Say how many conversations do not fit into a row, as the model does not learn from the rest of them."""
    rows: Any = trainer.train_dataset
    if not len(rows):  # TRL leaves out rows in which no answer begins
        raise ValueError(f"No answer begins within `max_length={args.max_length}` tokens: set it higher.")
    if args.eval_strategy != IntervalStrategy.NO:
        _require_evaluation(args, len(cast(Any, trainer.eval_dataset)))
    if args.packing or args.max_length is None:
        return
    num_full = sum(len(ids) >= args.max_length for ids in rows["input_ids"])
    if num_full:
        is_most = args.max_length >= (_find_longest(config) or args.max_length + 1)
        logger.warning(
            "Of %s, %d fill or exceed `max_length=%d` tokens, and are cut there: %s.",
            count(len(rows), "conversation"),
            num_full,
            args.max_length,
            "the model is meant for no more" if is_most else "set --max_length higher",
        )
