"""Engines of vLLM in a process of their own, under the Python of `make vllm`, which lacks `mot_hf`.

Jobs come as lines of JSON on standard input, and each is answered by one line on standard output. `{"start": {...}}`
replaces the engine by one with these arguments of `vllm.LLM`. `{"prompts": [[...], ...], "num_tokens": 8}` continues
prompts of token ids greedily and together; with `"score": true` their own tokens get log-probabilities too.
"""

import gc
import json
import os
import sys
import time
import traceback
from importlib import import_module
from typing import Any


def start(settings: dict[str, Any]) -> Any:
    """Make an engine."""
    return import_module("vllm").LLM(**settings)


def stop(engine: Any) -> None:
    """Give back what an engine holds, so that another can take its place."""
    if engine is not None:
        engine.llm_engine.engine_core.shutdown()
    del engine
    import_module("vllm.distributed").cleanup_dist_env_and_memory()
    gc.collect()


def answer(engine: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Continue the prompts of a job."""
    vllm = import_module("vllm")
    scoring = {"prompt_logprobs": 0} if job.get("score") else {}
    sampling = vllm.SamplingParams(temperature=0, max_tokens=job["num_tokens"], logprobs=0, **scoring)
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    begin = time.perf_counter()
    outputs = engine.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "answers": [describe(output) for output in outputs]}


def describe(output: Any) -> dict[str, Any]:
    """What one request got: tokens, their log-probabilities, and tokens whose keys and values were in the cache."""
    (completion,) = output.outputs
    tokens = list(completion.token_ids)
    scores = output.prompt_logprobs or []
    return {
        "tokens": tokens,
        "logprobs": pick(tokens, completion.logprobs),
        "prompt_logprobs": pick(output.prompt_token_ids[1:], scores[1:]),
        "num_cached": output.num_cached_tokens or 0,
    }


def pick(tokens: list[int], logprobs: Any) -> list[float]:
    """The log-probabilities of these tokens."""
    return [of_column[token].logprob for token, of_column in zip(tokens, logprobs or [], strict=False)]


def main() -> None:
    """Answer jobs to the end of standard input."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # where vLLM writes its own messages
    engine = None
    for line in sys.stdin:
        job = json.loads(line)
        reply: dict[str, Any] = {}
        try:
            if "start" in job:
                stop(engine)
                engine = None
                engine = start(job["start"])
            else:
                reply = answer(engine, job)
        except Exception:  # noqa: BLE001  # told to whoever asked
            reply = {"error": traceback.format_exc()}
        print(json.dumps(reply), file=replies)
    stop(engine)


if __name__ == "__main__":  # processes of tensor parallelism import this file too
    main()
