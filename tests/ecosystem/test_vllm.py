"""vLLM: checkpoints with their code through its backend for transformers, and exported ones by its own Qwen3-MoE.

`make vllm` builds it. An engine takes its time to start, so that one process runs one engine after the other, and
each answers all that is asked of it.
"""

import os
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from mot_hf import MoTForCausalLM
from mot_hf.conversion.export import export_qwen3_moe
from mot_hf.data.tokenizer import train_tokenizer
from scripts.benchmarks.serving.engines import Answer, EngineProcess, vllm_environment
from tests.models import tiny_config, trained

openai = pytest.importorskip("openai")
PYTHON = Path(os.environ.get("VLLM_PYTHON", "absent"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.is_file(), reason="VLLM_PYTHON names no Python with vLLM: `make vllm`"),
]

# Heads as wide as vLLM's attention takes them on a CPU, and widths that two processes can share.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "max_position_embeddings": 128}
NUM_NEW_TOKENS = 12
TEXTS = ["tokens of many rows are mixed", "a group of tokens", "rows and columns of a batch"]

# Fewer tokens in a step than the longer prompts have, so that these are prefilled in parts.
SERVED: dict[str, Any] = {
    "trust_remote_code": True,
    "dtype": "float32",
    "max_model_len": 128,
    "max_num_batched_tokens": 32,
    "max_num_seqs": 4,
    "block_size": 32,
    "enable_prefix_caching": True,
    "seed": 0,
}
EAGER = {"enforce_eager": True}


@dataclass
class Served:
    """What an engine made of the prompts: together, then each alone, then together again."""

    together: list[Answer]
    alone: list[Answer]
    again: list[Answer]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One trained model that answers in each of the modes, and its export."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    model = make_model(tokenizer, num_hidden_layers=2)  # compiled for every layer
    for mode in ("cross_example", "moe", "per_sequence"):
        model.set_mixing(inference_mixing=mode).save_pretrained(folder / mode)
        tokenizer.save_pretrained(folder / mode)
    export_qwen3_moe(folder / "moe", folder / "exported", allow_untuned=True)
    make_model(tokenizer).save_pretrained(folder / "deeper")  # whose rounding errors are many
    tokenizer.save_pretrained(folder / "deeper")
    return {name: folder / name for name in ("cross_example", "moe", "per_sequence", "exported", "deeper")}


def make_model(tokenizer: PreTrainedTokenizerFast, **sizes: Any) -> MoTForCausalLM:
    torch.manual_seed(0)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return trained(MoTForCausalLM(tiny_config(vocab_size=len(tokenizer), **SIZES, **special, **sizes)))


@pytest.fixture(scope="module")
def prompts(folders: dict[str, Path]) -> list[list[int]]:
    """Six prompts, three of which begin alike for more than a block of the cache."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(5, 300, (6, 60), generator=generator).tolist()
    return [rows[0][:9], rows[1][:1], rows[2], rows[2][:40] + rows[3][:7], rows[2][:36], rows[5][:20]]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    with EngineProcess(PYTHON, tmp_path_factory.mktemp("engines"), {"OMP_NUM_THREADS": "1"}) as process:
        yield process


def serve(engines: EngineProcess, prompts: list[list[int]], folder: Path, **settings: Any) -> Served:
    engines.start(folder, **(SERVED | settings))
    together, _ = engines.generate(prompts, NUM_NEW_TOKENS)
    alone = [engines.generate([prompt], NUM_NEW_TOKENS)[0][0] for prompt in prompts]
    again, _ = engines.generate(prompts, NUM_NEW_TOKENS)
    return Served(together, alone, again)


@torch.no_grad()
def generate(folder: Path, prompts: list[list[int]]) -> list[Answer]:
    """What each prompt gets from `generate`, alone."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, max_new_tokens=NUM_NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        tokens = output.sequences[0, len(prompt) :]
        logprobs = torch.cat(output.logits).log_softmax(dim=-1).gather(1, tokens[:, None]).squeeze(1)
        answers.append(Answer(tokens.tolist(), logprobs.tolist(), [], 0))
    return answers


def assert_same(actual: list[Answer], expected: list[Answer]) -> None:
    assert [answer.tokens for answer in actual] == [answer.tokens for answer in expected]
    for answer, other in zip(actual, expected, strict=True):
        assert answer.logprobs == pytest.approx(other.logprobs, abs=1e-5, rel=0)


@pytest.mark.parametrize("mode", ["per_sequence", "moe"])
def test_a_checkpoint_with_its_code_answers_as_generate_does(
    engines: EngineProcess, folders: dict[str, Path], prompts: list[list[int]], mode: str
) -> None:
    expected = generate(folders[mode], prompts)
    assert len({tuple(answer.tokens) for answer in expected}) == len(prompts)
    # The mode is the configuration's, which a server can override.
    served = serve(engines, prompts, folders["per_sequence"], hf_overrides={"inference_mixing": mode})
    for answers in (served.together, served.alone, served.again):
        assert_same(answers, expected)
    assert served.together[0].num_cached == 0
    assert sum(answer.num_cached > 0 for answer in served.again) == 3


def test_the_modes_differ(folders: dict[str, Path], prompts: list[list[int]]) -> None:
    in_modes = [[answer.tokens for answer in generate(folders[mode], prompts)] for mode in ("per_sequence", "moe")]
    assert in_modes[0] != in_modes[1]


def test_an_export_answers_as_mode_moe_by_vllms_own_model(
    engines: EngineProcess, folders: dict[str, Path], prompts: list[list[int]]
) -> None:
    served = serve(engines, prompts, folders["exported"], trust_remote_code=False, **EAGER)
    for answers in (served.together, served.alone, served.again):
        assert_same(answers, generate(folders["moe"], prompts))


def score(model: PreTrainedModel, prompts: list[list[int]]) -> Tensor:
    """Log-probabilities of all tokens of the prompts but the first of each."""
    scores = []
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            logprobs = model(ids).logits[0, :-1].float().log_softmax(dim=-1)
            scores.append(logprobs.gather(1, ids[0, 1:, None]).squeeze(1))
    return torch.cat(scores)


def test_bfloat16_costs_what_it_costs_in_transformers(
    engines: EngineProcess, folders: dict[str, Path], prompts: list[list[int]]
) -> None:
    engines.start(folders["deeper"], **(SERVED | EAGER | {"dtype": "bfloat16"}))
    answers, _ = engines.generate(prompts, NUM_NEW_TOKENS, score=True)
    served = torch.tensor([score for answer in answers for score in answer.prompt_logprobs])
    expected, rounded = (
        score(MoTForCausalLM.from_pretrained(folders["deeper"], dtype=dtype).eval(), prompts)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert len(served) == sum(len(prompt) - 1 for prompt in prompts)
    assert 0 < (served - expected).square().mean().sqrt() < 1.5 * (rounded - expected).square().mean().sqrt() < 0.1


def test_mode_cross_example_is_refused_with_the_reason(
    engines: EngineProcess, folders: dict[str, Path], prompts: list[list[int]]
) -> None:
    engines.start(folders["cross_example"], **(SERVED | EAGER))
    with pytest.raises(RuntimeError, match="mixing='cross_example' mixes different rows of the batch"):
        engines.generate(prompts[:1], NUM_NEW_TOKENS)


def test_two_processes_that_share_every_layer_answer_as_one(
    engines: EngineProcess, folders: dict[str, Path], prompts: list[list[int]]
) -> None:
    parallel = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    served = serve(engines, prompts, folders["per_sequence"], **parallel, **EAGER)
    for answers in (served.together, served.alone, served.again):
        assert_same(answers, generate(folders["per_sequence"], prompts))


class Server:
    """`vllm serve`, and a client of it."""

    def __init__(self, model_dir: Path, folder: Path, *options: str) -> None:
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", folder / "log.txt"
        # What `vllm serve` runs; the command itself asks for metadata that the CPU build has under another name.
        command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_dir)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "mot", *options]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=vllm_environment(folder) | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=subprocess.STDOUT
            )
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def wait(self) -> None:
        """Return when it answers."""
        for _ in range(1200):
            assert self.process.poll() is None, self.log.read_text()
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=10):
                    return
            except OSError:
                time.sleep(0.2)
        raise TimeoutError(self.log.read_text())

    def ask(self, prompt: list[int], num_chunks: int | None = None) -> list[int]:
        """Stream the tokens that continue a prompt, and hang up after some chunks."""
        wanted: dict[str, Any] = {"max_tokens": NUM_NEW_TOKENS, "temperature": 0, "stream": True}
        stream = self.client.completions.create(
            model="mot", prompt=prompt, **wanted, extra_body={"return_token_ids": True}
        )
        tokens = []
        for number, chunk in enumerate(stream, start=1):
            tokens += chunk.choices[0].token_ids or []
            if number == num_chunks:
                stream.close()
                break
        return tokens


@pytest.fixture
def server(folders: dict[str, Path], tmp_path: Path) -> Iterator[Server]:
    options = ["--trust-remote-code", "--dtype", "float32", "--max-model-len", "128", "--enforce-eager"]
    options += ["--max-num-batched-tokens", "32", "--max-num-seqs", "4", "--block-size", "32"]
    server = Server(folders["per_sequence"], tmp_path, *options)
    try:
        server.wait()
        yield server
    finally:
        server.process.terminate()
        server.process.wait()


def test_clients_that_come_and_go_get_what_they_get_alone(
    server: Server, folders: dict[str, Path], prompts: list[list[int]]
) -> None:
    expected = [answer.tokens for answer in generate(folders["per_sequence"], prompts)]
    assert [server.ask(prompt) for prompt in prompts] == expected
    together = threading.Barrier(12)

    def come(number: int) -> list[int]:
        together.wait()
        time.sleep(0.05 * (number % 4))
        return server.ask(prompts[number % 6], num_chunks=2 if number % 3 == 1 else None)

    with ThreadPoolExecutor(12) as clients:
        answers = list(clients.map(come, range(12)))
    for number, answer in enumerate(answers):
        wanted = expected[number % 6]
        assert answer == (wanted[: len(answer)] if number % 3 == 1 else wanted)
    assert [server.ask(prompt) for prompt in prompts] == expected
