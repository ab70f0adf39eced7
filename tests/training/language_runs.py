"""Tiny runs of language modeling that the tests of training share."""

import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Trainer, TrainingArguments

from mot_hf import MoTForCausalLM, MoTForMaskedLM
from mot_hf.training import CorpusArguments, MethodArguments, ModelArguments, train_language_model
from tests.models import tiny_config

WORDS = re.findall(r"\w+", "the quick brown fox jumps over the lazy dog and runs away from all these words")
TEXTS = [" ".join(WORDS[(place * number) % 16] for place in range(60)) for number in range(1, 40)]
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"group_size": 4, "num_experts": 8}


def write_text(folder: Path, texts: list[str] = TEXTS) -> str:
    """Write texts into a folder; returns its name."""
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    return str(folder)


def plain_tokenizer(vocab_size: int = 280, texts: list[str] = TEXTS) -> PreTrainedTokenizerFast:
    """A tokenizer with an end, but without tokens for padding and masking, as GPT-2's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def save_base(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    head: type[MoTForCausalLM | MoTForMaskedLM] = MoTForCausalLM,
    **fields: Any,
) -> str:
    """Save a model and its tokenizer; returns the name of the folder."""
    sizes = {"num_hidden_layers": 2, "pad_token_id": None, "initializer_range": 0.02}
    sizes["vocab_size"] = len(tokenizer) if tokenizer else 280
    head(tiny_config(**(sizes | fields))).save_pretrained(folder)
    if tokenizer:
        tokenizer.save_pretrained(folder)
    return str(folder)


def train(
    folder: Path,
    source: str,
    *,
    model: dict[str, Any] | None = None,
    corpus: dict[str, Any] | None = None,
    method: dict[str, Any] | None = None,
    masked: bool = False,
    **arguments: Any,
) -> Trainer:
    """Train for four steps of eight rows, with a checkpoint after two."""
    settings: dict[str, Any] = {
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "train_sampling_strategy": "sequential",
    }
    return train_language_model(
        ModelArguments(**(SMALL if model is None else model)),
        CorpusArguments(**({"source": source, "block_length": 12} | (corpus or {}))),
        TrainingArguments(str(folder), **(settings | arguments)),
        MethodArguments(monitor_mixing=False, **(method or {})),
        masked=masked,
    )
