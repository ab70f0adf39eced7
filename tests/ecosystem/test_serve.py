"""`transformers serve`, OpenAI's protocol: a request gets what it gets alone, and none ends the server for others."""

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from mot_hf import MoTForCausalLM
from mot_hf.data.tokenizer import train_tokenizer
from mot_hf.serving import MAX_BODY_BYTES
from tests.models import MODES, tiny_config, trained

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

pytestmark = pytest.mark.slow

# Memory so short that requests wait for one another and are prefilled in parts.
CONTINUOUS_BATCHING = ["--continuous-batching", "--cb-block-size", "4", "--cb-num-blocks", "48"]
CONTINUOUS_BATCHING += ["--cb-max-batch-tokens", "16"]

TEXTS = ["tokens of many rows are mixed", "a group of tokens", "rows and columns of a batch"]
CHAT_TEMPLATE = """
{%- for message in messages %}{{ message['role'] }}: {{ message['content'] }}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""


class Request(NamedTuple):
    """What a client wants."""

    prompt: str
    num_tokens: int
    is_streamed: bool
    is_chat: bool


class Answer(NamedTuple):
    """What it gets."""

    text: str
    num_tokens: int
    finish_reason: str


REQUESTS = [
    Request(TEXTS[number % 3][number:] + "?" * (number % 2), 3 + 5 * (number % 5), number % 3 > 0, number % 4 == 3)
    for number in range(16)
]


class Server:
    """The server in a process of its own, and a client of it."""

    def __init__(self, log: Path, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "mot_cli", "serve", "--host", "127.0.0.1", "--port", str(port)]
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*command, "--device", "cpu", *options],
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.url = f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)
        self.streams: list[tuple[float, float]] = []  # first and last token of each

    def wait(self, status: int = 200) -> None:
        """Return when its health is this HTTP status."""
        for _ in range(1200):
            assert self.process.poll() is None, self.log.read_text()
            if self.health() == status:
                return
            time.sleep(0.1)
        raise TimeoutError(self.log.read_text())

    def health(self) -> int | None:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=10) as reply:
                return reply.status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:  # not yet listening
            return None

    def post(self, path: str, body: Any) -> tuple[int, dict[str, Any]]:
        """Status and answer of one request: a body that is no bytes is sent as JSON."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=120)
        data = body if isinstance(body, bytes | Iterator) else json.dumps(body).encode()
        connection.request("POST", path, data, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())

    def ask(self, folder: Path, request: Request) -> Answer:
        """One request, to its end."""
        arguments: dict[str, Any] = {"model": str(folder), "max_tokens": request.num_tokens, "temperature": 0}
        arguments["stream"] = request.is_streamed
        if request.is_chat:
            messages = [{"role": "user", "content": request.prompt}]
            reply = self.client.chat.completions.create(messages=messages, **arguments)
        else:
            reply = self.client.completions.create(prompt=request.prompt, **arguments)
        if request.is_streamed:
            times, parts = zip(*((time.monotonic(), part) for part in reply), strict=True)
            self.streams.append((times[0], times[-1]))
        else:
            parts = [reply]
        choices = [part.choices[0] for part in parts if part.choices]
        texts = [text_of(choice, request) for choice in choices]
        return Answer("".join(texts), parts[-1].usage.completion_tokens, choices[-1].finish_reason)


def text_of(choice: Any, request: Request) -> str:
    if not request.is_chat:
        return choice.text
    return (choice.delta if request.is_streamed else choice.message).content or ""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model, saved to answer in each of the modes, and once without a chat template."""
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    torch.manual_seed(0)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = trained(MoTForCausalLM(tiny_config(vocab_size=len(tokenizer), max_position_embeddings=256, **special)))
    is_text = torch.tensor([tokenizer.decode([token]).isascii() for token in range(len(tokenizer))])
    with torch.no_grad():
        # Halves of characters cannot be streamed; and some requests should end by themselves.
        model.lm_head.weight[~is_text] = 0
        model.lm_head.weight[tokenizer.eos_token_id] *= 2
    folder = tmp_path_factory.mktemp("served")
    for mode in (*MODES, "untemplated"):
        tokenizer.chat_template = None if mode == "untemplated" else CHAT_TEMPLATE
        model.set_mixing(inference_mixing="per_sequence" if mode == "untemplated" else mode)
        model.save_pretrained(folder / mode)
        tokenizer.save_pretrained(folder / mode)
    return {mode: folder / mode for mode in (*MODES, "untemplated")}


def start_server(log: Path, *options: str) -> Iterator[Server]:
    server = Server(log, *options)
    try:
        server.wait()
        yield server
    finally:
        server.process.terminate()
        server.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from start_server(tmp_path_factory.mktemp("server") / "log.txt", *CONTINUOUS_BATCHING)


@pytest.fixture(scope="module")
def plain_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that answers requests one after the other."""
    yield from start_server(tmp_path_factory.mktemp("plain_server") / "log.txt")


def answer_alone(folder: Path, request: Request) -> Answer:
    """What `generate` makes of a request in a batch of its own."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = MoTForCausalLM.from_pretrained(folder)
    prompt = request.prompt
    if request.is_chat:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=request.num_tokens, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    reason = "length" if len(new) == request.num_tokens else "stop"
    return Answer(tokenizer.decode(new, skip_special_tokens=True), len(new), reason)


@pytest.mark.parametrize("mode", ["per_sequence", "moe"])
def test_requests_that_come_together_get_what_they_get_alone(
    server: Server, folders: dict[str, Path], mode: str
) -> None:
    folder = folders[mode]
    expected = [answer_alone(folder, request) for request in REQUESTS]
    assert len({answer.text for answer in expected}) > 8
    assert {answer.finish_reason for answer in expected} == {"stop", "length"}
    assert [server.ask(folder, request) for request in REQUESTS] == expected
    together = threading.Barrier(len(REQUESTS))

    def ask(request: Request) -> Answer:
        together.wait()
        return server.ask(folder, request)

    server.streams.clear()
    with ThreadPoolExecutor(len(REQUESTS)) as clients:
        assert list(clients.map(ask, REQUESTS)) == expected
    assert max(sum(first <= time <= last for first, last in server.streams) for time, _ in server.streams) > 2


def test_the_modes_differ(folders: dict[str, Path]) -> None:
    answers = [[answer_alone(folders[mode], request) for request in REQUESTS] for mode in ("per_sequence", "moe")]
    assert answers[0] != answers[1]


COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
USER = [{"role": "user", "content": "tokens"}]
LONG = "tokens " * 300
CACHE_TOKENS = 47 * 4  # all blocks but one

# Path, body, status, and a part of the reason.
REFUSED: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "empty": (COMPLETIONS, {"prompt": ""}, 400, "`prompt` must be a text"),
    "empty_stream": (COMPLETIONS, {"prompt": "", "stream": True}, 400, "`prompt` must be a text"),
    "missing": (COMPLETIONS, {}, 400, "`prompt` must be a text"),
    "tokens": (COMPLETIONS, {"prompt": [5, 6]}, 400, "no tokens"),
    "empty_messages": (CHAT, {"messages": []}, 400, "`messages` must be a list of messages"),
    "own_template": (
        CHAT,
        {"messages": USER, "chat_template_kwargs": {"chat_template": "{% for i in range(99999) %}{% endfor %}"}},
        400,
        "cannot bring a chat template",
    ),
    "empty_input": (RESPONSES, {"input": ""}, 400, "`input` must be a text or a list"),
    "long": (COMPLETIONS, {"prompt": LONG}, 400, "too long for the 256 positions of the model"),
    "long_stream": (COMPLETIONS, {"prompt": LONG, "stream": True}, 400, "too long for the 256 positions"),
    "long_chat": (CHAT, {"messages": [{"role": "user", "content": LONG}]}, 400, "too long for the 256 positions"),
    "long_chat_stream": (
        CHAT,
        {"messages": [{"role": "user", "content": LONG}], "stream": True},
        400,
        "too long for the 256 positions",
    ),
    "long_input": (RESPONSES, {"input": LONG}, 400, "too long for the 256 positions"),
    "huge": (COMPLETIONS, {"prompt": "tokens " * 200_000}, 400, "of 1400000 characters is too long"),
    "length": (COMPLETIONS, {"prompt": "tokens", "max_tokens": 10**6}, 400, "`max_tokens`=1000000 are too long"),
    "no_length": (COMPLETIONS, {"prompt": "tokens", "max_tokens": 0}, 400, "`max_tokens` must be at least 1"),
    "negative": (CHAT, {"messages": USER, "max_completion_tokens": -5}, 400, "`max_completion_tokens` must be"),
    "word": (RESPONSES, {"input": "tokens", "max_output_tokens": "many"}, 400, "`max_output_tokens` must be"),
    "two_answers": (
        COMPLETIONS,
        {"prompt": "tokens", "generation_config": '{"num_return_sequences": 2, "do_sample": true}'},
        400,
        "A request gets one answer",
    ),
    "half": (COMPLETIONS, {"prompt": "half \ud83d"}, 400, "half a character"),
    "wrong_messages": (CHAT, {"messages": [{"content": "x"}]}, 400, "KeyError('role')"),
    "no_messages": (CHAT, {"messages": [5]}, 400, "do not follow OpenAI's API"),
    "beams": (
        COMPLETIONS,
        {"prompt": "tokens", "generation_config": '{"num_beams": 100000}'},
        400,
        "`num_beams` must be from 1 to 16",
    ),
    "watermark": (
        COMPLETIONS,
        {"prompt": "tokens", "generation_config": '{"watermarking_config": {"greenlist_ratio": 0.2}}'},
        400,
        "`watermarking_config` of `generation_config` cannot be chosen",
    ),
    "method": (
        COMPLETIONS,
        {"prompt": "tokens", "generation_config": '{"validate": 1}'},
        400,
        "`validate` of `generation_config` cannot be chosen",
    ),
    "end": (
        COMPLETIONS,
        {"prompt": "tokens", "generation_config": '{"eos_token_id": "x"}'},
        400,
        "`eos_token_id` must be a token id",
    ),
    "deep": (
        COMPLETIONS,
        {"prompt": "tokens", "generation_config": "[" * 100_000},
        400,
        "must be the JSON text of an object",
    ),
    "bad_words": (
        COMPLETIONS,
        {"prompt": "tokens", "generation_config": '{"bad_words_ids": [[5], [6, 99999]]}'},
        400,
        "`bad_words_ids` has the token 99999",
    ),
    "suppressed": (
        COMPLETIONS,
        {"prompt": "tokens", "generation_config": '{"suppress_tokens": [99999]}'},
        400,
        "`suppress_tokens` has the token 99999",
    ),
    "forced": (
        COMPLETIONS,
        {"prompt": "tokens", "stream": True, "generation_config": '{"forced_eos_token_id": 99999}'},
        400,
        "`forced_eos_token_id` has the token 99999",
    ),
    "padding": (
        COMPLETIONS,
        {"prompt": "tokens", "generation_config": '{"pad_token_id": -7}'},
        400,
        "`pad_token_id` has the token -7",
    ),
    "biased": (CHAT, {"messages": USER, "logit_bias": {"99999": 1}}, 400, "`logit_bias` has the token 99999"),
    "biased_by_words": (
        CHAT,
        {"messages": USER, "logit_bias": {"5": "much"}},
        400,
        "`logit_bias` must have a number for every token",
    ),
    "biased_word": (CHAT, {"messages": USER, "logit_bias": {"word": 1}}, 400, "`logit_bias` has the token word"),
    "suffix": (COMPLETIONS, {"prompt": "tokens", "suffix": 5}, 400, "`suffix` must be a text"),
    "temperature": (COMPLETIONS, {"prompt": "tokens", "temperature": "hot"}, 400, "`temperature` must be a number"),
    "seed": (COMPLETIONS, {"prompt": "tokens", "seed": 2**80}, 400, "`seed` must be an integer"),
    "stop": (COMPLETIONS, {"prompt": "tokens", "stop": 5}, 400, "`stop` must be"),
    "bias": (CHAT, {"messages": USER, "logit_bias": [3]}, 400, "`logit_bias` must be an object"),
    "settings": (COMPLETIONS, {"prompt": "tokens", "generation_config": "[]"}, 400, "`generation_config` must be"),
    "no_model": (COMPLETIONS, {"prompt": "tokens", "model": None}, 400, "`model` must be a name"),
    "model": (COMPLETIONS, {"prompt": "tokens", "model": "nobody/nothing"}, 404, "'nobody/nothing' cannot be read"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_answered_is_refused_with_the_reason(
    server: Server, folders: dict[str, Path], kind: str
) -> None:
    path, body, status, reason = REFUSED[kind]
    actual, answer = server.post(path, {"model": str(folders["per_sequence"])} | body)
    assert actual == status
    assert answer["error"].keys() == {"message", "type", "param", "code"}
    assert reason in answer["error"]["message"]
    request = Request("tokens", 3, is_streamed=False, is_chat=False)
    assert server.ask(folders["per_sequence"], request).num_tokens == 3
    assert server.health() == 200


_PLAIN = ("empty", "long_chat", "length", "empty_input", "beams", "model", "end", "bad_words", "suppressed", "biased")


@pytest.mark.parametrize("kind", _PLAIN)
def test_the_same_without_continuous_batching(plain_server: Server, folders: dict[str, Path], kind: str) -> None:
    path, body, status, reason = REFUSED[kind]
    actual, answer = plain_server.post(path, {"model": str(folders["per_sequence"])} | body)
    assert actual == status
    assert reason in answer["error"]["message"]
    request = Request(TEXTS[0], 6, is_streamed=True, is_chat=True)
    assert plain_server.ask(folders["per_sequence"], request) == answer_alone(folders["per_sequence"], request)


def test_biases_are_followed_as_openai_takes_them(plain_server: Server, folders: dict[str, Path]) -> None:
    body = {"model": str(folders["per_sequence"]), "messages": USER, "max_tokens": 3, "logit_bias": {"37": 100}}
    status, answer = plain_server.post(CHAT, body)
    assert status == 200
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folders["per_sequence"])
    assert answer["choices"][0]["message"]["content"] == tokenizer.decode([37] * 3)


def test_a_body_that_is_too_long_is_refused(server: Server, folders: dict[str, Path]) -> None:
    for body in ({"prompt": "tokens " * 3_000_000}, (b" " * 2**19 for _ in range(MAX_BODY_BYTES // 2**19 + 1))):
        start = time.monotonic()
        status, answer = server.post(COMPLETIONS, body)
        assert status == 413
        assert answer["error"]["code"] == "request_too_large"
        assert time.monotonic() - start < 10
    request = Request("tokens", 3, is_streamed=False, is_chat=False)
    assert server.ask(folders["per_sequence"], request).num_tokens == 3


def test_prompt_and_answer_may_fill_the_cache_and_no_more(server: Server, folders: dict[str, Path]) -> None:
    body = {"model": str(folders["moe"]), "max_tokens": 8, "temperature": 0}
    token = "?"
    for num_tokens, status in ((CACHE_TOKENS - 8, 200), (CACHE_TOKENS - 7, 400), (CACHE_TOKENS - 8, 200)):
        actual, answer = server.post(COMPLETIONS, body | {"prompt": token * num_tokens})
        assert actual == status
        if status == 200:
            assert answer["usage"]["prompt_tokens"] == num_tokens
        else:
            assert (
                f"too long for the {CACHE_TOKENS} tokens that the server's cache holds" in answer["error"]["message"]
            )
            assert answer["error"]["param"] == "max_tokens"
    # Whoever asks for no length gets what there is room for.
    del body["max_tokens"]
    actual, answer = server.post(COMPLETIONS, body | {"prompt": token * (CACHE_TOKENS - 3)})
    assert actual == 200
    assert answer["usage"]["completion_tokens"] <= 3


def test_without_a_chat_template_completions_are_pointed_to(server: Server, folders: dict[str, Path]) -> None:
    model = {"model": str(folders["untemplated"])}
    for path, body in ((CHAT, {"messages": USER}), (RESPONSES, {"input": "tokens"})):
        status, answer = server.post(path, model | body)
        assert status == 400
        assert "has no chat template: ask /v1/completions" in answer["error"]["message"]
    assert server.post(COMPLETIONS, model | {"prompt": "tokens", "max_tokens": 3})[0] == 200


def test_openais_client_understands_a_refusal(server: Server, folders: dict[str, Path]) -> None:
    with pytest.raises(openai.BadRequestError, match="must be a text") as refusal:
        server.ask(folders["per_sequence"], Request("", 3, is_streamed=True, is_chat=False))
    assert refusal.value.param == "prompt"
    with pytest.raises(openai.NotFoundError):
        server.ask(Path("nobody/nothing"), Request("tokens", 3, is_streamed=False, is_chat=False))


REASON = "mixing='cross_example' mixes different rows of the batch"


def test_mode_cross_example_is_refused_with_the_reason(server: Server, folders: dict[str, Path]) -> None:
    streamed, whole = (Request("tokens", 8, is_streamed, is_chat=False) for is_streamed in (True, False))
    with pytest.raises(openai.APIError) as refusal:
        server.ask(folders["cross_example"], streamed)
    assert REASON in str(refusal.value.body)
    server.wait(503)
    with pytest.raises(openai.APIStatusError) as refusal:
        server.ask(folders["cross_example"], whole)
    assert refusal.value.status_code == 503
    assert REASON in str(refusal.value.body)
    # A model in another mode is served on.
    assert server.ask(folders["moe"], whole) == answer_alone(folders["moe"], whole)
    assert server.health() == 200
