"""Tokenizers that do not fit their model: enlarged, refused or warned of before the first step."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerFast

from mot_hf import MoTForCausalLM, MoTForMaskedLM, MoTPreTrainedModel
from mot_hf.data.chat import CHAT_TEMPLATE
from mot_hf.data.tokenizer import train_tokenizer
from mot_hf.training import add_callbacks
from mot_hf.training.vocabulary import check_meanings, count_tokens, enlarge_embeddings
from tests.models import tiny_config
from tests.training.language_runs import TEXTS, plain_tokenizer, save_base, train, write_text
from tests.training.trainers import make_trainer, model_of, same_tensors


@pytest.fixture
def padded() -> PreTrainedTokenizerFast:
    """A tokenizer of 280 tokens that got one more."""
    tokenizer = plain_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


class TestStockTrainer:
    def test_a_token_beyond_the_vocabulary_is_refused_before_the_first_step(
        self, padded: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        model = MoTForCausalLM(tiny_config(vocab_size=280))
        trainer = make_trainer(model, tmp_path, max_steps=1)
        trainer.processing_class = trainer.callback_handler.processing_class = padded
        add_callbacks(trainer)
        message = r"281 tokens \(such as '<pad>', id 280\).*embeddings for 280.*model.resize_token_embeddings\(281\)"
        with pytest.raises(ValueError, match=message):
            trainer.train()
        assert trainer.state.global_step == 0
        model.resize_token_embeddings(281)
        assert trainer.train().global_step == 1

    @pytest.mark.parametrize("head", [MoTForCausalLM, MoTForMaskedLM])
    def test_without_the_check_it_trains_and_saves_a_model_that_loads(
        self, head: type[MoTPreTrainedModel], padded: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        trainer = make_trainer(head(tiny_config(vocab_size=280)), tmp_path, max_steps=2, save_strategy="epoch")
        trainer.processing_class = padded
        trainer.train()
        trainer.save_model()
        loaded = head.from_pretrained(tmp_path / "checkpoint-2")
        assert loaded.config.pad_token_id == 280
        assert loaded.get_input_embeddings().padding_idx is None
        assert same_tensors(loaded.state_dict(), head.from_pretrained(tmp_path).state_dict())

    @pytest.mark.parametrize("processing_class", [None, SimpleNamespace(pad_token_id=99), plain_tokenizer(259)])
    def test_what_fits_or_has_no_vocabulary_passes(self, processing_class: object, tmp_path: Path) -> None:
        trainer = make_trainer(MoTForCausalLM(tiny_config(vocab_size=300)), tmp_path, max_steps=1)
        trainer.callback_handler.processing_class = processing_class
        add_callbacks(trainer)
        trainer.train()


def embeddings_of(model: MoTPreTrainedModel) -> list[Tensor]:
    """The input and output embeddings of a language model."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    return [cast(nn.Embedding | nn.Linear, module).weight for module in modules]


class TestEnlarging:
    def test_ids_that_a_tokenizer_leaves_out_are_counted(self) -> None:
        assert count_tokens(plain_tokenizer()) == 280
        assert count_tokens(SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 9}, eos_token_id=3)) == 10
        assert count_tokens(SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 9}, eos_token_id=11)) == 12

    def test_a_model_with_room_is_left_alone(self, padded: PreTrainedTokenizerFast) -> None:
        model = MoTForCausalLM(tiny_config(vocab_size=300))
        enlarge_embeddings(model, padded)
        assert model.config.vocab_size == len(model.get_input_embeddings().weight) == 300

    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("head", [MoTForCausalLM, MoTForMaskedLM])
    def test_old_rows_stay_and_new_ones_lie_among_them(
        self, head: type[MoTPreTrainedModel], tied: bool, padded: PreTrainedTokenizerFast
    ) -> None:
        model = head(tiny_config(vocab_size=280, tie_word_embeddings=tied))
        before = [weight.detach().clone() for weight in embeddings_of(model)]
        enlarge_embeddings(model, padded)
        assert model.config.vocab_size == model.model.config.vocab_size == 281
        after = embeddings_of(model)
        assert (after[0] is after[1]) is tied
        for new, old in zip(after, before, strict=True):
            assert torch.equal(new[:280], old)
            assert 0 < new[280].norm() < 3 * old.norm(dim=1).mean()
        assert model(torch.tensor([[280, 3]])).logits.shape == (1, 2, 281)

    @pytest.mark.parametrize(("size", "padded", "expected"), [(320, True, 384), (320, False, 321), (280, True, 281)])
    def test_a_padded_vocabulary_stays_one(self, size: int, padded: bool, expected: int) -> None:
        tokenizer = plain_tokenizer(size)
        tokenizer.add_tokens([f"<{number}>" for number in range(size + 1 - len(tokenizer))])
        model = MoTForCausalLM(tiny_config(vocab_size=size))
        enlarge_embeddings(model, tokenizer, padded=padded)
        assert model.config.vocab_size == len(model.get_input_embeddings().weight) == expected
        assert len(model.lm_head.weight) == expected


class TestScripts:
    @pytest.mark.parametrize("is_new", [True, False])
    def test_a_tokenizer_gets_the_template_of_chats_when_asked_for(self, is_new: bool, tmp_path: Path) -> None:
        base = save_base(tmp_path / "base", plain_tokenizer())
        model = None if is_new else {"model_name_or_path": base}
        corpus = {"chat_template": True} | ({"vocab_size": 290} if is_new else {})
        source = write_text(tmp_path / "text")
        train(tmp_path / "run", source, model=model, corpus=corpus)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
        assert tokenizer.chat_template == CHAT_TEMPLATE
        assert len(tokenizer) == (290 if is_new else 285)  # 280, padding, and the four of chats
        assert MoTForCausalLM.from_pretrained(tmp_path / "run").config.vocab_size == len(tokenizer)
        train(tmp_path / "plain", source)
        with pytest.raises(ValueError, match="`chat_template=True` adds tokens, but the run of the checkpoint"):
            train(tmp_path / "plain", source, corpus=corpus, resume_from_checkpoint="true")

    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("masked", [False, True])
    def test_a_checkpoint_whose_tokenizer_lacks_tokens_gets_room_for_them(
        self, masked: bool, tied: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        head = MoTForMaskedLM if masked else MoTForCausalLM
        base = save_base(tmp_path / "base", plain_tokenizer(), head, tie_word_embeddings=tied)
        num_tokens = 282 if masked else 281
        train(tmp_path / "run", write_text(tmp_path / "text"), model={"model_name_or_path": base}, masked=masked)
        assert f"The tokenizer has {num_tokens} tokens, but the model had embeddings for 280" in caplog.text
        auto = AutoModelForMaskedLM if masked else AutoModelForCausalLM
        for saved in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
            tokenizer = AutoTokenizer.from_pretrained(saved)
            assert len(tokenizer) == auto.from_pretrained(saved).config.vocab_size == num_tokens

    @pytest.mark.parametrize(("lora_rank", "tied"), [(0, False), (2, False), (2, True)])
    def test_a_larger_tokenizer_gets_room_and_the_run_resumes(
        self, lora_rank: int, tied: bool, tmp_path: Path
    ) -> None:
        base = save_base(tmp_path / "base", plain_tokenizer(), tie_word_embeddings=tied)
        plain_tokenizer(300).save_pretrained(tmp_path / "larger")
        source = write_text(tmp_path / "text")
        arguments = {
            "model": {"model_name_or_path": base},
            "corpus": {"tokenizer": str(tmp_path / "larger")},
            "method": {"lora_rank": lora_rank},
        }
        whole = train(tmp_path / "whole", source, **arguments)
        assert model_of(whole).config.vocab_size == 301
        checkpoint = str(tmp_path / "whole" / "checkpoint-2")
        resumed = train(tmp_path / "resumed", source, **arguments, resume_from_checkpoint=checkpoint)
        assert same_tensors(model_of(resumed).state_dict(), model_of(whole).state_dict())
        auto = AutoPeftModelForCausalLM if lora_rank else AutoModelForCausalLM
        loaded = auto.from_pretrained(tmp_path / "whole").eval()
        ids = torch.tensor([[5, 290, 300, 7]])
        with torch.no_grad():
            expected = model_of(whole).eval()(ids).logits
            torch.testing.assert_close(loaded(ids).logits, expected)

    @pytest.mark.parametrize("vocab_size", [280, 300])
    def test_a_tokenizer_of_another_text_is_refused(self, vocab_size: int, tmp_path: Path) -> None:
        base = save_base(tmp_path / "base", plain_tokenizer())
        plain_tokenizer(vocab_size, ["another kind of text " * 3] * 9).save_pretrained(tmp_path / "other")
        message = (
            r"other.*\(2\d\d tokens\) differs from the tokenizer of.*base.*\d+ ids stand for other tokens, such as 25"
        )
        with pytest.raises(ValueError, match=message):
            train(
                tmp_path / "run",
                "no text is read",
                model={"model_name_or_path": base},
                corpus={"tokenizer": str(tmp_path / "other")},
            )

    def test_without_a_tokenizer_to_compare_with_it_is_said(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        base = save_base(tmp_path / "base", None)
        plain_tokenizer(300).save_pretrained(tmp_path / "larger")
        model, corpus = {"model_name_or_path": base}, {"tokenizer": str(tmp_path / "larger")}
        source = write_text(tmp_path / "text")
        trained = train(tmp_path / "run", source, model=model, corpus=corpus, max_steps=1)
        assert "base'` has no tokenizer to compare" in caplog.text
        assert model_of(trained).config.vocab_size == 301
        with pytest.raises(OSError, match="base' has no tokenizer: choose one with --tokenizer"):
            train(tmp_path / "none", source, model=model)

    def test_the_size_of_a_tokenizer_that_is_not_trained_is_refused(self, tmp_path: Path) -> None:
        base = save_base(tmp_path / "base", plain_tokenizer())
        model, corpus = {"model_name_or_path": base}, {"vocab_size": 500}
        with pytest.raises(
            ValueError, match=r"`vocab_size=500` is only for a tokenizer that is trained.*has 281 tokens"
        ):
            train(tmp_path / "run", "no text is read", model=model, corpus=corpus)


def test_the_same_ids_in_another_format_are_the_same_tokenizer(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 280)
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    text = path.read_text()
    assert '"!": 3' in text  # the order of the entries means nothing
    path.write_text(text.replace('"!": 3,', "", 1).replace('"vocab": {', '"vocab": {"!": 3,', 1))
    check_meanings(AutoTokenizer.from_pretrained(tmp_path), tokenizer, name="one", own_name="other")
