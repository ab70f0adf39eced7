"""The benchmark of serving at a small size, with engines of transformers in place of vLLM's."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Self

import pytest

from scripts.benchmarks.serving import engine_worker
from scripts.benchmarks.serving import run as benchmark
from scripts.benchmarks.serving.engines import Answer, EngineProcess, vllm_environment


class Engine:
    """Answers as transformers does, and takes twice as long for Qwen3-MoE as for MoT."""

    def __init__(self, python: str, folder: Path) -> None:
        assert python == sys.executable
        self.settings: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def start(self, model_dir: Path, **settings: Any) -> None:
        self.folder, self.settings = model_dir, settings

    def generate(self, prompts: list[list[int]], num_tokens: int) -> tuple[list[Answer], float]:
        mode = self.settings.get("hf_overrides", {"inference_mixing": "per_sequence"})["inference_mixing"]
        is_mot = self.settings["trust_remote_code"]
        return benchmark.generate(self.folder, mode if is_mot else None, prompts, num_tokens), 1.0 if is_mot else 2.0


def test_every_engine_is_timed_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "EngineProcess", Engine)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_experts": 32, "vocab_size": 64}
    few = {"num_requests": 2, "prompt_length": 4, "num_new_tokens": 2, "num_rounds": 2}
    benchmark.main(benchmark.Arguments(output_dir=str(tmp_path), python=sys.executable, **sizes, **few))
    results = json.loads((tmp_path / "serving.json").read_text())["results"]
    assert list(results) == list(benchmark.SERVED)
    for name, result in results.items():
        assert result["same_answers"] == result["answers"] == 2
        assert result["largest_difference"] == 0
        assert result["answers_speed"]["relative_speed"] == (2 if name.startswith("MoT") else 1)
    table = (tmp_path / "serving.md").read_text()
    assert "| MoT, `per_sequence` | 2 of 2 | 0.0e+00 | 2.00 | 2.00 |" in table
    assert table.strip() == capsys.readouterr().out.strip()


def test_a_python_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="run `make vllm` first"):
        benchmark.main(benchmark.Arguments(python="/nowhere/python"))


class Sampling(SimpleNamespace):
    pass


def answer(job: dict[str, Any]) -> tuple[dict[str, Any], Sampling]:
    """What the worker makes of a job with an engine that appends two tokens."""
    used = []

    def generate(prompts: list[dict[str, Any]], sampling: Sampling, use_tqdm: bool) -> list[Any]:
        used.append(sampling)
        completion = SimpleNamespace(token_ids=[7, 8], logprobs=[{7: SimpleNamespace(logprob=-1.0)}, {8: SCORE}])
        scores = [None, *({token: SCORE} for token in prompts[0]["prompt_token_ids"][1:])]
        fields = {"prompt_logprobs": scores if hasattr(sampling, "prompt_logprobs") else None}
        fields |= {"prompt_token_ids": prompts[0]["prompt_token_ids"], "num_cached_tokens": None}
        return [SimpleNamespace(outputs=[completion], **fields)]

    return engine_worker.answer(SimpleNamespace(generate=generate), job), used[0]


SCORE = SimpleNamespace(logprob=-2.0)


def test_the_worker_tells_tokens_and_their_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = ModuleType("vllm")
    vllm.SamplingParams = Sampling
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    job = {"prompts": [[3, 4, 5]], "num_tokens": 2}
    reply, sampling = answer(job)
    expected = {"tokens": [7, 8], "logprobs": [-1.0, -2.0], "prompt_logprobs": [], "num_cached": 0}
    assert reply["answers"] == [expected]
    assert (sampling.temperature, sampling.max_tokens) == (0, 2)
    assert answer(job | {"score": True})[0]["answers"] == [expected | {"prompt_logprobs": [-2.0, -2.0]}]


def test_an_engine_that_cannot_start_says_why(tmp_path: Path) -> None:
    # With a Python that lacks vLLM.
    with (
        EngineProcess(sys.executable, tmp_path) as engine,
        pytest.raises(RuntimeError, match="No module named 'vllm'"),
    ):
        engine.start("nowhere")


def test_caches_of_vllm_stay_in_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    environment = vllm_environment(tmp_path)
    assert "PYTHONPATH" not in environment
    assert Path(environment["VLLM_CACHE_ROOT"]).parent == tmp_path
