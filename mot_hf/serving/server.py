"""Guards around `transformers serve`: requests that would stop or block the server are refused before they reach it.

The server itself is that of transformers, with checks before four of its methods.
"""

import functools
import importlib
import inspect
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from mot_hf.serving.requests import (
    RequestError,
    check_answers,
    check_fields,
    check_length,
    check_model_name,
    check_text,
    check_tokens,
    find_position_limit,
)

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from transformers import GenerationConfig, PreTrainedModel

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 2 * 2**20  # more than a prompt of 100,000 tokens in any script

# The field with the prompt of a request, by the server's handler.
_PROMPTS = {"chat_handler": "messages", "completion_handler": "prompt", "response_handler": "input"}
_UPLOADS = "/v1/audio/"  # recordings are larger than texts

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def guard_server() -> None:
    """Makes `transformers serve` refuse requests that would stop it. Call it before you start the server.

    Bodies of more than [`MAX_BODY_BYTES`] are refused unread (HTTP 413), and with HTTP 400 and the reason: an empty
    prompt, a prompt that is too long together with its answer for the model or the cache of continuous batching,
    fields of a wrong type, and whatever a chat template or the tokenizer refuses. A missing model is HTTP 404.
    """
    server = importlib.import_module("transformers.cli.serving.server")
    build_server = server.build_server

    @functools.wraps(build_server)
    def build_guarded_server(*args: Any, **kwargs: Any) -> Any:
        parts = inspect.signature(build_server).bind(*args, **kwargs).arguments
        for name, part in parts.items():
            if name.endswith("_handler") and hasattr(part, "_resolve_model"):
                _guard_handler(part, _PROMPTS.get(name))
        _guard(parts["generation_state"], "get_manager", _guarding_manager)
        return _guard_app(build_server(*args, **kwargs))

    server.build_server = build_guarded_server  # pyright: ignore[reportAttributeAccessIssue]  # a module's function


def _guard(part: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a method of one object; some versions of transformers may lack it."""
    method = getattr(part, name, None)
    if method is None:
        logger.warning("%s has no %s: some requests may end the server.", type(part).__name__, name)
    else:
        setattr(part, name, functools.wraps(method)(make(method)))


def _guard_app(app: Any) -> Any:
    from jinja2 import TemplateError

    async def answer(request: "Request", error: Exception) -> "JSONResponse":
        return to_response(error if isinstance(error, RequestError) else RequestError(str(error)))

    # Transformers and the tokenizer raise ValueError for what they cannot take, chat templates an error of their own.
    for kind in (RequestError, ValueError, TemplateError):
        app.add_exception_handler(kind, answer)
    app.add_middleware(BodyLimit)
    return app


def to_response(error: RequestError) -> "JSONResponse":
    """Makes the answer to a refused request, in OpenAI's format.

    Args:
        error ([`RequestError`]): Why.

    Returns:
        `JSONResponse`: The response.
    """
    from starlette.responses import JSONResponse

    fields = {"message": str(error), "type": "invalid_request_error", "param": error.param, "code": error.code}
    return JSONResponse({"error": fields}, status_code=error.status)


class BodyLimit:
    """Middleware that reads a request's body and refuses it if it is too long.

    Args:
        app (`Callable`): The ASGI application.
    """

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["path"].startswith(_UPLOADS):
            return await self.app(scope, receive, send)
        body = await _read_body(receive)
        if body is None:
            error = RequestError(
                f"The request's body has more than {MAX_BODY_BYTES} bytes.", code="request_too_large", status=413
            )
            return await to_response(error)(scope, receive, send)
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> Message:
            return next(messages, None) or await receive()

        return await self.app(scope, replay, send)


async def _read_body(receive: Receive) -> bytes | None:
    """The whole body, or None if it is too long or broken off.

    It is read to its end, for a client listens only when it has sent.
    """
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part, more = message.get("body", b""), message.get("more_body", False)
        size += len(part)
        if size <= MAX_BODY_BYTES:
            parts.append(part)
        else:
            parts.clear()
    return b"".join(parts) if size <= MAX_BODY_BYTES else None


def _guard_handler(handler: Any, prompt_name: str | None) -> None:
    """Check a request's fields, the model it names and the size of its text before the handler goes on."""
    has_own_model = handler.model_manager.force_model is not None
    _guard(handler, "_validate_request", functools.partial(_validating, prompt_name, has_own_model))
    _guard(handler, "_resolve_model", functools.partial(_resolving, prompt_name))
    if prompt_name is not None:
        _guard(handler, "_build_generation_config", _refusing_settings)
    if prompt_name in ("messages", "input"):
        _guard(handler, "get_processor_inputs_from_messages", _refusing_messages)
    if prompt_name == "input":
        _guard(handler, "_normalize_input", _refusing_messages)


def _validating(prompt_name: str | None, has_own_model: bool, validate: Callable[..., Any]) -> Callable[..., Any]:
    def check(body: dict[str, Any]) -> Any:
        if not has_own_model or body.get("model") is not None:
            check_model_name(body)
        if prompt_name is not None:
            check_fields(body, prompt_name)
            if body.get("logit_bias"):  # OpenAI takes integers too, transformers does not
                body["logit_bias"] = {token: float(bias) for token, bias in body["logit_bias"].items()}
        return validate(body)

    return check


def _resolving(prompt_name: str | None, resolve: Callable[..., Any]) -> Callable[..., Any]:
    def check(body: dict[str, Any]) -> Any:
        try:
            resolved = resolve(body)
        except OSError as error:
            reason = f"The model {body['model']!r} cannot be read: {error}"
            raise RequestError(reason, "model", "model_not_found", status=404) from error
        if prompt_name is not None:
            _, model, processor = resolved
            check_tokens(body, model.config.get_text_config().vocab_size)
            check_text(body, prompt_name, model, processor)
        return resolved

    return check


def _refusing_messages(convert: Callable[..., Any]) -> Callable[..., Any]:
    def check(*args: Any) -> Any:
        try:
            return convert(*args)
        except (AttributeError, KeyError, TypeError) as error:
            raise RequestError(f"The messages do not follow OpenAI's API: {error!r}.") from error

    return check


def _refusing_settings(build: Callable[..., Any]) -> Callable[..., Any]:
    def check(*args: Any, **kwargs: Any) -> Any:
        try:
            return build(*args, **kwargs)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise RequestError(f"The settings cannot be followed: {error!r}.", "generation_config") from error

    return check


def _guarding_manager(get_manager: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: _GuardedManager(get_manager(*args, **kwargs))


class _GuardedManager:
    """A generation manager that checks the tokenized prompt first."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def init_cb(self, model: "PreTrainedModel", gen_config: "GenerationConfig") -> None:
        """Wait: the worker keeps the settings of the first request, which must not be one that is refused."""

    def generate_streaming(
        self, model: "PreTrainedModel", processor: Any, inputs: dict[str, Any], gen_config: Any, **kwargs: Any
    ) -> Any:
        self._start(model, inputs, gen_config)
        return self._manager.generate_streaming(model, processor, inputs, gen_config, **kwargs)

    async def generate_non_streaming(
        self, model: "PreTrainedModel", processor: Any, inputs: dict[str, Any], gen_config: Any, **kwargs: Any
    ) -> Any:
        self._start(model, inputs, gen_config)
        return await self._manager.generate_non_streaming(model, processor, inputs, gen_config, **kwargs)

    def _start(self, model: "PreTrainedModel", inputs: dict[str, Any], gen_config: "GenerationConfig") -> None:
        ids = inputs["input_ids"]  # a list for continuous batching, else [1, T]
        num_tokens = len(ids) if isinstance(ids, list) else ids.shape[-1]
        check_length(num_tokens, gen_config, find_position_limit(model), "positions of the model")
        check_answers(gen_config)
        self._manager.init_cb(model, gen_config)
        cache_limit = _find_cache_limit(getattr(self._manager, "_cb", None))
        check_length(num_tokens, gen_config, cache_limit, "tokens that the server's cache holds")


def _find_cache_limit(manager: Any) -> int | None:
    """Tokens of one request that continuous batching has room for; None without it, or if its worker has ended."""
    if manager is None:
        return None
    while getattr(manager, "batch_processor", None) is None:  # the first request comes before its cache is made
        if not manager.is_running():
            return None
        time.sleep(0.01)
    cache = manager.batch_processor.cache
    num_tokens = getattr(cache, "max_tokens_read", None) or cache.num_pages  # the latter before transformers 5.24
    # A request may occupy one block more than it fills.
    return num_tokens - num_tokens // cache.num_blocks
