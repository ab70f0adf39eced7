"""Checks of requests: what the server cannot take is refused by its name, before any work is done."""

import json
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

_LENGTHS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_OBJECTS = ("logit_bias", "chat_template_kwargs")
_MAX_BEAMS = 16  # each has a cache of its own
# Settings that would end the worker of continuous batching, or change the kind of the answer.
_NO_SETTINGS = ("watermarking_config", "return_dict_in_generate")
# Settings that name tokens. An end that is no token is harmless.
_TOKENS = (
    *("bad_words_ids", "begin_suppress_tokens", "force_words_ids", "forced_bos_token_id", "forced_eos_token_id"),
    *("pad_token_id", "sequence_bias", "suppress_tokens"),
)
_NUMBERS = ("temperature", "top_p", "frequency_penalty")

# The field in which the request asks for a number of new tokens, if it has one.
_asked_length: ContextVar[str | None] = ContextVar("asked_length", default=None)


class RequestError(Exception):
    """A request that is refused, with the reason in OpenAI's terms.

    Args:
        message (`str`): What is wrong, and what to do.
        param (`str`, *optional*): The wrong field of the request.
        code (`str`, *optional*): OpenAI's name for the error.
        status (`int`, *optional*, defaults to 400): HTTP status.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


def check_model_name(body: dict[str, Any]) -> None:
    """Refuses a request that names no model.

    Args:
        body (`dict`): The request.

    Raises:
        RequestError: `model` is no name.
    """
    _check(isinstance(body.get("model"), str) and body["model"], "`model` must be a name.", "model")


def check_fields(body: dict[str, Any], prompt_name: str) -> None:
    """Refuses fields of a request whose values the server cannot take.

    Args:
        body (`dict`): The request.
        prompt_name (`str`): Its field for the prompt: `"messages"`, `"prompt"` or `"input"`.

    Raises:
        RequestError: A field is missing, empty or of a wrong type.
    """
    prompt, kinds = body.get(prompt_name), {"messages": list, "prompt": str, "input": (str, list)}[prompt_name]
    wanted = {"messages": "a list of messages", "prompt": "a text (no lists, no tokens)", "input": "a text or a list"}
    is_there = isinstance(prompt, kinds) and prompt
    _check(is_there, f"`{prompt_name}` must be {wanted[prompt_name]}, and not empty.", prompt_name)
    for name in _LENGTHS:
        number = body.get(name)
        _check(number is None or (_is_number(number, int) and number >= 1), f"`{name}` must be at least 1.", name)
    for name in _OBJECTS:
        _check(body.get(name) is None or isinstance(body[name], dict), f"`{name}` must be an object.", name)
    for name in _NUMBERS:
        _check(body.get(name) is None or _is_number(body[name], int | float), f"`{name}` must be a number.", name)
    are_numbers = all(_is_number(bias, int | float) for bias in (body.get("logit_bias") or {}).values())
    _check(are_numbers, "`logit_bias` must have a number for every token.", "logit_bias")
    own_template = "chat_template" in (body.get("chat_template_kwargs") or {})
    _check(not own_template, "A request cannot bring a chat template of its own.", "chat_template_kwargs")
    suffix = body.get("suffix")
    _check(suffix is None or isinstance(suffix, str), "`suffix` must be a text.", "suffix")
    seed = body.get("seed")
    in_range = seed is None or (_is_number(seed, int) and -(2**63) <= seed < 2**63)
    _check(in_range, "`seed` must be an integer of 64 bits.", "seed")
    stop = body.get("stop") or []
    are_texts = isinstance(stop, str) or (isinstance(stop, list) and all(isinstance(text, str) for text in stop))
    _check(are_texts, "`stop` must be a text or a list of texts.", "stop")
    if (settings := body.get("generation_config")) is not None:
        _check_settings(settings)
    _asked_length.set(next((name for name in _LENGTHS if body.get(name) is not None), None))


def _check_settings(text: Any) -> None:
    """Refuse a `generation_config` that is no object, or that generation could not follow."""
    from transformers import GenerationConfig

    try:
        settings = json.loads(text)
    except (TypeError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise RequestError("`generation_config` must be the JSON text of an object.", "generation_config")
    for name, value in settings.items():
        is_setting = name not in _NO_SETTINGS and not callable(getattr(GenerationConfig, name, None))
        _check(is_setting, f"`{name}` of `generation_config` cannot be chosen by a request.", "generation_config")
        if name.endswith("_token_id"):
            is_token = value is None or _is_number(value, int) or _are_numbers(value)
            _check(is_token, f"`{name}` must be a token id.", "generation_config")
    beams = settings.get("num_beams", 1)
    are_few = beams is None or (_is_number(beams, int) and 1 <= beams <= _MAX_BEAMS)
    _check(are_few, f"`num_beams` must be from 1 to {_MAX_BEAMS}.", "generation_config")


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_number(each, int) for each in value)


def check_tokens(body: dict[str, Any], vocab_size: int) -> None:
    """Refuses tokens that the model does not have: on a GPU, one of them would end the server.

    Args:
        body (`dict`): The request.
        vocab_size (`int`): Number of the model's tokens.

    Raises:
        RequestError: A field of the request, or of its `generation_config`, names such a token.
    """
    named = {"logit_bias": [int(token) if token.isdecimal() else token for token in body.get("logit_bias") or {}]}
    settings = json.loads(body.get("generation_config") or "{}")
    named |= {name: list(_find_tokens(settings[name])) for name in _TOKENS if name in settings}
    for name, tokens in named.items():
        for token in tokens:
            is_known = _is_number(token, int) and 0 <= token < vocab_size
            _check(is_known, f"`{name}` has the token {token}, and the model those from 0 to {vocab_size - 1}.", name)


def _find_tokens(value: Any) -> Iterator[Any]:
    """The tokens of a setting: one, or lists of them; biases stand beside theirs and are fractions."""
    if isinstance(value, list):
        for part in value:
            yield from _find_tokens(part)
    elif value is not None and not isinstance(value, float):
        yield value


def check_text(body: dict[str, Any], prompt_name: str, model: "PreTrainedModel", processor: Any) -> None:
    """Refuses a text before it is tokenized, if no tokens can spell it or it is too long to fit.

    Args:
        body (`dict`): The request.
        prompt_name (`str`): Its field for the prompt.
        model (`PreTrainedModel`): The model that is asked for.
        processor (`PreTrainedTokenizerBase` or `ProcessorMixin`): Its tokenizer.

    Raises:
        RequestError: The text holds halves of characters, is too long, or no chat template is there for it.
    """
    if prompt_name != "prompt" and not getattr(processor, "chat_template", None):
        raise RequestError(
            "The model's tokenizer has no chat template: ask /v1/completions, or save a template with the tokenizer.",
            "model",
        )
    texts = [*_find_texts(body[prompt_name]), *_find_texts(body.get("instructions"))]
    if any("\ud800" <= char <= "\udfff" for text in texts for char in text if not char.isascii()):
        raise RequestError("The text contains half a character (a lone surrogate).", prompt_name)
    limit = find_position_limit(model)
    num_chars = sum(map(len, texts))
    # A token has at least one character, so most texts need no look at the vocabulary.
    if limit is None or num_chars <= limit:
        return
    tokenizer = getattr(processor, "tokenizer", processor)
    if num_chars > limit * max(map(len, tokenizer.get_vocab())):
        _refuse_length(f"of {num_chars} characters is", f"the {limit} positions of the model", prompt_name)


def _find_texts(value: Any) -> Iterator[str]:
    """The texts of a prompt or of messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _find_texts(part)
    elif isinstance(value, dict):
        yield from _find_texts(value.get("content"))
        yield from _find_texts(value.get("text"))


def check_answers(gen_config: "GenerationConfig") -> None:
    """Refuses to give several answers.

    Args:
        gen_config (`GenerationConfig`): How to answer.

    Raises:
        RequestError: It asks for several.
    """
    _check((gen_config.num_return_sequences or 1) == 1, "A request gets one answer.", "generation_config")


def check_length(num_tokens: int, gen_config: "GenerationConfig", limit: int | None, holder: str) -> None:
    """Refuses a prompt that is empty, or too long together with its answer; cuts an answer of no requested length.

    Args:
        num_tokens (`int`): Tokens of the prompt.
        gen_config (`GenerationConfig`): How to answer; its `max_new_tokens` may be lowered.
        limit (`int`, *optional*): Most tokens of prompt and answer together; None for any number.
        holder (`str`): What holds so many.

    Raises:
        RequestError: The prompt is empty, or too long.
    """
    _check(num_tokens, "The prompt must not be empty: it has no tokens.")
    asked, num_new = _asked_length.get(), gen_config.max_new_tokens
    is_length = num_new is None or (_is_number(num_new, int) and num_new >= 1)
    _check(is_length, f"`max_new_tokens`={num_new!r} must be at least 1.", "generation_config")
    if limit is None:
        return
    if num_tokens >= limit:
        _refuse_length(f"of {num_tokens} tokens is", f"the {limit} {holder}")
    num_free = limit - num_tokens
    if asked is not None and num_new is not None and num_new > num_free:
        _refuse_length(f"of {num_tokens} tokens and `{asked}`={num_new} are", f"the {limit} {holder}", asked)
    gen_config.max_new_tokens = num_free if num_new is None else min(num_new, num_free)


def find_position_limit(model: "PreTrainedModel") -> int | None:
    """The most tokens of prompt and answer together that a model has positions for, if it says."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _check(holds: Any, message: str, param: str | None = None) -> None:
    if not holds:
        raise RequestError(message, param)


def _refuse_length(size: str, limit: str, param: str | None = None) -> NoReturn:
    reason = f"The prompt {size} too long for {limit}, which prompt and answer share."
    raise RequestError(reason, param, "context_length_exceeded")
