"""Chats as text: the template, the tokens of turns, and which of them are the assistant's."""

from pathlib import Path

import pytest
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mot_hf.data.chat import CHAT_TOKENS, END_OF_TURN_TOKEN, add_chat_template
from mot_hf.data.tokenizer import END_TOKEN, token_byte_counts, train_tokenizer

CHAT = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": " what is {{ a }} group? "},
    {"role": "assistant", "content": "rows\n  of a batch\n"},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": "é"},
]
TEXTS = [message["content"] for message in CHAT] * 9


@pytest.fixture(params=["trained with it", "added"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    if request.param == "added":
        tokenizer = train_tokenizer(TEXTS, vocab_size=280)
        assert add_chat_template(tokenizer) == len(CHAT_TOKENS)
        return tokenizer
    return train_tokenizer(TEXTS, vocab_size=280, chat_template=True)


def spell(chat: list[dict[str, str]]) -> str:
    return "".join(f"<|{message['role']}|>{message['content']}{END_OF_TURN_TOKEN}" for message in chat)


def test_every_turn_is_its_role_its_text_and_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == spell(CHAT)
    prompt = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert spell(CHAT).startswith(prompt)
    assert prompt == f"{spell(CHAT[:2])}<|assistant|>"


def test_the_loss_is_that_of_answers_and_their_ends(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    chosen = [token for token, is_own in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if is_own]
    assert tokenizer.decode(chosen) == f"rows\n  of a batch\n{END_OF_TURN_TOKEN}é{END_OF_TURN_TOKEN}"


def test_a_mark_is_one_token_without_bytes_and_left_out_of_text(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.convert_tokens_to_ids(CHAT_TOKENS)
    assert len(set(ids)) == len(CHAT_TOKENS)
    assert tokenizer("".join(CHAT_TOKENS))["input_ids"] == ids
    assert tokenizer.decode(tokenizer(spell(CHAT))["input_ids"], skip_special_tokens=True) == "".join(
        message["content"] for message in CHAT
    )
    assert token_byte_counts(tokenizer)[ids].tolist() == [0] * len(CHAT_TOKENS)


@pytest.mark.parametrize("end", [END_OF_TURN_TOKEN, END_TOKEN, ""])
def test_an_answer_is_what_stands_between_the_marks(tokenizer: PreTrainedTokenizerFast, end: str) -> None:
    prompt = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    parsed = tokenizer.parse_response(f"  rows\n{end}", prefix=prompt)
    assert parsed == {"role": "assistant", "content": "  rows\n"}


def test_the_template_is_saved_and_adding_it_again_changes_nothing(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    size = len(tokenizer)
    assert add_chat_template(tokenizer) == 0
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == size
    assert loaded.apply_chat_template(CHAT, tokenize=False) == spell(CHAT)
    assert loaded.response_template == tokenizer.response_template is not None


def test_its_size_includes_them_and_documents_still_end_as_before() -> None:
    tokenizer = train_tokenizer(TEXTS, vocab_size=264, chat_template=True)
    assert len(tokenizer) == 264
    assert tokenizer.eos_token == END_TOKEN
    with pytest.raises(ValueError, match="use 263 or more"):
        train_tokenizer(TEXTS, vocab_size=262, chat_template=True)
    assert train_tokenizer(TEXTS, vocab_size=262).chat_template is None


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "tool", "content": "x"}, "The roles are system, user and assistant, not 'tool'"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}]}, "The content of a message must be text"),
        ({"role": "user", "content": None}, "The content of a message must be text"),
    ],
)
def test_what_the_template_cannot_write_is_refused(message: dict, reason: str) -> None:
    with pytest.raises(TemplateError, match=reason):
        train_tokenizer(TEXTS, vocab_size=280, chat_template=True).apply_chat_template([message])
