"""`transformers serve`, the OpenAI-style server: every request gets what it gets alone."""

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
from mot_hf.corpus import train_tokenizer
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

    def __init__(self, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "mot_hf.cli", "serve", "--host", "127.0.0.1", "--port", str(port)]
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*command, "--device", "cpu", *CONTINUOUS_BATCHING],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
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
    """The same model, saved to answer in each of the modes."""
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = trained(MoTForCausalLM(tiny_config(vocab_size=len(tokenizer), max_position_embeddings=256, **special)))
    is_text = torch.tensor([tokenizer.decode([token]).isascii() for token in range(len(tokenizer))])
    with torch.no_grad():
        # Halves of characters cannot be streamed; and some requests should end by themselves.
        model.lm_head.weight[~is_text] = 0
        model.lm_head.weight[tokenizer.eos_token_id] *= 2
    folder = tmp_path_factory.mktemp("served")
    for mode in MODES:
        model.set_mixing(inference_mixing=mode).save_pretrained(folder / mode)
        tokenizer.save_pretrained(folder / mode)
    return {mode: folder / mode for mode in MODES}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server") / "log.txt")
    try:
        server.wait()
        yield server
    finally:
        server.process.terminate()
        server.process.wait()


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
