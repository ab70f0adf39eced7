"""Tuning on conversations: what is learned, in which mode, and what is saved."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mot_hf import MoTForCausalLM
from mot_hf.data.chat import CHAT_TOKENS, END_OF_TURN_TOKEN
from mot_hf.data.instructions import InstructionArguments
from mot_hf.data.tokenizer import END_TOKEN, train_tokenizer
from mot_hf.training import MethodArguments
from tests.models import companions_of, tiny_config, trained
from tests.training.language_runs import TEXTS, WORDS
from tests.training.trainers import losses_of, model_of, same_tensors

pytest.importorskip("trl")
from mot_hf.training.instructions import SFTArguments, choose_mixing, tune_on_instructions

CHATS = [
    [
        {"role": "user", "content": f"{WORDS[number % 16]} {WORDS[number % 7]}"},
        {"role": "assistant", "content": f"{WORDS[number % 7]} {WORDS[number % 16]} {WORDS[number % 5]}"},
    ]
    for number in range(72)
]
NUM_STEPS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("base"), train_tokenizer(TEXTS, vocab_size=320))


def save(folder: Path, tokenizer: PreTrainedTokenizerBase, **fields: Any) -> Path:
    torch.manual_seed(0)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = trained(MoTForCausalLM(tiny_config(vocab_size=len(tokenizer), num_hidden_layers=2, **special, **fields)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("chats")
    for name, chats in (("train", CHATS[:64]), ("validation", CHATS[64:])):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    return str(folder)


def arguments(folder: Path, **settings: Any) -> SFTArguments:
    defaults: dict[str, Any] = {
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": 8,
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return SFTArguments(str(folder), **(defaults | settings))


def tune(folder: Path, base: Path, source: str, *, method: dict[str, Any] | None = None, **settings: Any) -> Any:
    asked = {name: settings.pop(name) for name in ("mixing",) if name in settings}
    return tune_on_instructions(
        InstructionArguments(str(base), source=source, **asked),
        arguments(folder, **settings),
        MethodArguments(monitor_mixing=False, **(method or {})),
    )


def first_loss(base: Path, mode: str) -> float:
    """The loss on the first eight conversations, counted token by token."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = MoTForCausalLM.from_pretrained(base).train()
    rows = [tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True) for chat in CHATS]
    losses = []
    encoded = tokenizer.pad({"input_ids": [row["input_ids"] for row in rows[:8]]}, return_tensors="pt")
    with torch.no_grad():
        logits = model(**encoded, mixing=mode).logits
    for row, scores in zip(rows, logits, strict=False):
        for place, (token, is_own) in enumerate(zip(row["input_ids"], row["assistant_masks"], strict=True)):
            if is_own:
                losses.append(F.cross_entropy(scores[place - 1], torch.tensor(token)))
    return torch.stack(losses).mean().item()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer had the template from the beginning."""
    return save(tmp_path_factory.mktemp("prepared"), train_tokenizer(TEXTS, vocab_size=320, chat_template=True))


@pytest.mark.parametrize(("num_rows", "mode"), [(8, "cross_example"), (6, "per_sequence")])
def test_the_loss_is_that_of_answers_in_the_mode_that_suits_the_batch(
    prepared: Path, source: str, tmp_path: Path, num_rows: int, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="mot_hf"):
        trainer = tune(tmp_path, prepared, source, per_device_train_batch_size=num_rows)
    losses = losses_of(trainer)
    assert losses[-1] < losses[0] - 1
    assert model_of(trainer).config.mixing == mode
    assert ("Batches of 6 rows do not fill groups of 4 rows" in caplog.text) is (mode == "per_sequence")
    assert not [record for record in caplog.records if record.name.endswith("group_check")]
    if num_rows == 8:
        assert losses[0] == pytest.approx(first_loss(prepared, mode), abs=1e-4)
        assert abs(losses[0] - first_loss(prepared, "per_sequence")) > 1e-3


def test_what_is_saved_answers_in_turns(base: Path, source: str, tmp_path: Path) -> None:
    tune(tmp_path, base, source, mixing="per_sequence")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    settings = GenerationConfig.from_pretrained(tmp_path)
    model = MoTForCausalLM.from_pretrained(tmp_path)
    end, of_documents = tokenizer.convert_tokens_to_ids([END_OF_TURN_TOKEN, END_TOKEN])
    assert settings.eos_token_id == [end, of_documents]
    assert (tokenizer.eos_token_id, model.config.eos_token_id) == (end, end)
    assert settings.pad_token_id == model.config.pad_token_id == tokenizer.pad_token_id
    assert len(tokenizer) == len(AutoTokenizer.from_pretrained(base)) + len(CHAT_TOKENS)
    assert model.config.vocab_size == len(model.get_input_embeddings().weight) == len(tokenizer)
    assert json.loads((tmp_path / "training.json").read_text())["base_model"] == base.name
    assert not (tmp_path / "README.md").exists() or "trl" not in (tmp_path / "README.md").read_text().lower()[:400]


def test_settings_of_other_modes_stay_as_they_were(base: Path, source: str, tmp_path: Path) -> None:
    tune(tmp_path, base, source, max_steps=1)
    before, after = (MoTForCausalLM.from_pretrained(folder).config for folder in (base, tmp_path))
    for name in ("router_aux_loss_coef", "output_router_logits", "mixing", "inference_mixing", "num_experts_per_tok"):
        assert getattr(after, name) == getattr(before, name)


def test_mode_moe_answers_so_and_has_the_balancing_loss_of_the_model(source: str, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, vocab_size=320, chat_template=True)
    save(tmp_path / "base", tokenizer, mixing="moe", output_router_logits=True, router_aux_loss_coef=0.5)
    trainer = tune(tmp_path / "run", tmp_path / "base", source, max_steps=1)
    assert trainer.state.log_history[0]["aux_loss"] > 0
    config = MoTForCausalLM.from_pretrained(tmp_path / "run").config
    assert (config.mixing, config.inference_mixing) == ("moe", "moe")
    assert (config.output_router_logits, config.router_aux_loss_coef) == (True, 0.5)


def test_asking_for_a_mode(base: Path, source: str, tmp_path: Path) -> None:
    trainer = tune(tmp_path, base, source, mixing="moe", max_steps=1)
    assert "aux_loss" not in trainer.state.log_history[0]
    assert model_of(trainer).config.inference_mixing == "moe"


@pytest.mark.parametrize("method", [{}, {"lora_rank": 2}])
def test_a_resumed_run_ends_like_one_that_was_not_interrupted(
    base: Path, source: str, tmp_path: Path, method: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "method": method}
    whole = tune(tmp_path / "whole", base, source, **saving)
    tune(tmp_path / "parts", base, source, **saving)
    (tmp_path / "parts" / "checkpoint-4").rename(tmp_path / "moved")
    resumed = tune(tmp_path / "parts", base, source, resume_from_checkpoint="true", **saving)
    assert losses_of(resumed) == losses_of(whole)
    assert same_tensors(model_of(resumed).state_dict(), model_of(whole).state_dict())
    with pytest.raises(ValueError, match="has checkpoints of an earlier run"):
        tune(tmp_path / "parts", base, source, **saving)
    with pytest.raises(ValueError, match="learning_rate"):
        tune(tmp_path / "parts", base, source, resume_from_checkpoint="true", **saving, learning_rate=1e-3)
    with pytest.raises(ValueError, match="mixing='cross_example' in the checkpoint and 'moe' now"):
        tune(tmp_path / "parts", base, source, resume_from_checkpoint="true", **saving, mixing="moe")


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_learn_the_tokens_of_turns_too(source: str, tmp_path: Path, tied: bool) -> None:
    peft = pytest.importorskip("peft")
    base = save(tmp_path / "base", train_tokenizer(TEXTS, vocab_size=320), tie_word_embeddings=tied)
    trainer = tune(tmp_path / "run", base, source, method={"lora_rank": 2}, max_steps=8)
    assert losses_of(trainer)[-1] < losses_of(trainer)[0] - 0.3
    learned = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert sum("token_adapter" in name for name in learned) == 1 + (not tied)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    merged = loaded.merge_and_unload()
    before = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.tensor(AutoTokenizer.from_pretrained(tmp_path / "run").apply_chat_template(CHATS[:1]).input_ids)
    with torch.no_grad():
        expected = trainer.model.eval()(ids).logits
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=1e-4)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old, new = before.state_dict()[name], merged.state_dict()[name]
        assert torch.equal(old, new[: len(old)])


def test_wrapped_packing_fills_rows(prepared: Path, source: str, tmp_path: Path) -> None:
    batches: list[torch.Size] = []
    trainer = tune(tmp_path, prepared, source, packing=True, max_length=32, max_steps=1)
    batches = [torch.tensor(row["input_ids"]).shape for row in trainer.train_dataset]
    assert {shape[0] for shape in batches[:-1]} == {32}
    labels = torch.tensor([row["labels"] for row in trainer.train_dataset.select(range(2))])
    assert (labels == -100).any()
    assert (labels != -100).any()


def test_rows_of_several_sequences_are_refused_where_rows_are_mixed(
    prepared: Path, source: str, tmp_path: Path
) -> None:
    packing = {"packing": True, "packing_strategy": "bfd", "max_length": 64, "max_steps": 1}
    with pytest.raises(ValueError, match=r"`packing_strategy='bfd'` makes one row .* --packing_strategy wrapped, or"):
        tune(tmp_path, prepared, source, **packing)
    with pytest.raises(ValueError, match="`padding_free=True` makes one row of several sequences"):
        tune(tmp_path, prepared, source, padding_free=True)
    assert tune(tmp_path, prepared, source, **packing, mixing="per_sequence").state.global_step == 1
    assert tune(tmp_path / "few", prepared, source, **packing, per_device_train_batch_size=2).state.global_step == 1


def test_rows_are_flattened_without_padding(prepared: Path, source: str, tmp_path: Path) -> None:
    trainer = tune(tmp_path / "flat", prepared, source, padding_free=True, mixing="per_sequence")
    padded = tune(tmp_path / "padded", prepared, source, mixing="per_sequence")
    assert losses_of(trainer) == pytest.approx(losses_of(padded), rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"max_length": 9}, "No answer of the held-out conversations begins within `max_length=9` tokens"),
        ({"dataloader_drop_last": True, "per_device_eval_batch_size": 16}, "leaves nothing of the 8 held-out"),
        ({"metric_for_best_model": "accuracy"}, "`metric_for_best_model='accuracy'` must be one of loss, entropy,"),
    ],
)
def test_evaluations_that_give_no_loss_are_refused(
    prepared: Path, source: str, tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    late = [{"role": "user", "content": " ".join(WORDS[:12])}, {"role": "assistant", "content": WORDS[0]}]
    folder = tmp_path / "chats"
    folder.mkdir()
    (folder / "train.jsonl").write_text((Path(source) / "train.jsonl").read_text())
    (folder / "validation.jsonl").write_text("\n".join([json.dumps({"messages": late})] * 8))
    with pytest.raises(ValueError, match=reason):
        tune(tmp_path / "run", prepared, str(folder), eval_strategy="steps", **settings)


def test_conversations_that_do_not_fit_are_counted(
    prepared: Path, source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="mot_hf"):
        tune(tmp_path, prepared, source, max_length=9, max_steps=1)
        tune(tmp_path, prepared, source, max_length=80, max_steps=1)
    (cut,) = [record.getMessage() for record in caplog.records if "are cut there" in record.getMessage()]
    assert "fill or exceed `max_length=9` tokens, and are cut there: set --max_length higher." in cut
    assert "Rows of `max_length=80` tokens are longer than the rows that the model is meant for" in caplog.text
    assert "set --max_length to 64 or less" in caplog.text
    with pytest.raises(ValueError, match="No answer begins within `max_length=2` tokens"):
        tune(tmp_path, prepared, source, max_length=2)


def test_the_statistics_stay_in_mode_per_sequence_and_follow_full_groups(
    prepared: Path, source: str, tmp_path: Path
) -> None:
    before = companions_of(MoTForCausalLM.from_pretrained(prepared))
    alone = companions_of(model_of(tune(tmp_path / "alone", prepared, source, mixing="per_sequence", max_steps=1)))
    mixed = companions_of(model_of(tune(tmp_path / "mixed", prepared, source, max_steps=1)))
    assert all(torch.equal(value, before[name]) for name, value in alone.items())
    assert not any(torch.equal(value, before[name]) for name, value in mixed.items() if "num_batches" not in name)


def test_a_template_of_its_own_stays(source: str, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, vocab_size=320)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] + ': ' }}{% generation %}{{ message['content'] + "
        "eos_token }}{% endgeneration %}{% endfor %}"
    )
    base = save(tmp_path / "base", tokenizer)
    tune(tmp_path / "run", base, source, max_steps=1)
    saved = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert saved.chat_template == tokenizer.chat_template
    assert len(saved) == len(tokenizer)
    assert GenerationConfig.from_pretrained(tmp_path / "run").eos_token_id == [tokenizer.eos_token_id]


def test_a_dense_model_has_no_modes(source: str, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, vocab_size=320)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2}
    Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), head_dim=16, **sizes)).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    trainer = tune(tmp_path / "run", tmp_path / "dense", source, per_device_train_batch_size=6)
    assert losses_of(trainer)[-1] < losses_of(trainer)[0]
    with pytest.raises(ValueError, match="`mixing='moe'` is for MoT models, and this is one of type 'qwen3'"):
        choose_mixing(Qwen3Config(), "moe", arguments(tmp_path))


@pytest.mark.parametrize(
    ("method", "settings", "reason"),
    [
        ({"tp_size": 2}, {}, "Models that are tuned on conversations are whole in every process"),
        ({"transition_share": 0.5}, {}, "`transition_share=0.5` is for `mot train`"),
        ({}, {"max_steps": 0}, "`max_steps=0` must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(
    base: Path, source: str, tmp_path: Path, method: dict[str, Any], settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        tune(tmp_path, base, source, method=method, **settings)


def test_a_model_without_a_tokenizer_is_refused(source: str, tmp_path: Path) -> None:
    MoTForCausalLM(tiny_config()).save_pretrained(tmp_path / "base")
    with pytest.raises(OSError, match="has no tokenizer: save the one that the model was trained with"):
        tune(tmp_path / "run", tmp_path / "base", source)


def test_adapters_are_no_model_to_tune(source: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds adapters, not a model: merge them"):
        tune(tmp_path / "run", tmp_path, source)
