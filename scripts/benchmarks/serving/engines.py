"""vLLM from this side: a process with its Python that runs one engine after the other."""

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

# Most of an engine's messages, and a look at another host, are of no use here.
_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    # Engines that run at the same time would be bound to the same cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


@dataclass
class Answer:
    """What vLLM makes of one prompt.

    Args:
        tokens (`list[int]`): The tokens that it appends.
        logprobs (`list[float]`): Their log-probabilities, in nats.
        prompt_logprobs (`list[float]`): Those of the prompt's own tokens but the first, if they were asked for.
        num_cached (`int`): Tokens of the prompt that were in the cache already.
    """

    tokens: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float]
    num_cached: int


def vllm_environment(folder: Path) -> dict[str, str]:
    """Makes the environment of a process with vLLM that keeps its caches in a folder.

    Args:
        folder (`Path`): The folder.

    Returns:
        `dict[str, str]`: All variables.
    """
    caches = {name: str(folder / name) for name in ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "HF_MODULES_CACHE")}
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return inherited | _QUIET | caches


class EngineProcess:
    """A process that runs vLLM.

    Args:
        python (`str` or `Path`): The Python of an environment with vLLM.
        folder (`Path`): Folder for caches and `log.txt`.
        environment (`Mapping[str, str]`, *optional*): Further variables.
    """

    def __init__(self, python: str | Path, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "log.txt"
        worker = Path(__file__).with_name("engine_worker.py")
        # In this process, unless several share a model: one less to start and to wait for.
        variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | dict(environment or {})
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [str(python), str(worker)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=vllm_environment(folder) | variables,
            )

    def start(self, model_dir: str | Path, **settings: Any) -> None:
        """Starts an engine in place of the one before.

        Args:
            model_dir (`str` or `Path`): Folder of the model.
            settings: Arguments of `vllm.LLM`.

        Raises:
            RuntimeError: It does not start.
        """
        self._ask({"start": {"model": str(model_dir), **settings}})

    def generate(self, prompts: list[list[int]], num_tokens: int, score: bool = False) -> tuple[list[Answer], float]:
        """Continues prompts greedily, all together.

        Args:
            prompts (`list[list[int]]`): Token ids.
            num_tokens (`int`): Tokens to append to each at most.
            score (`bool`, *optional*, defaults to `False`): Whether to score the prompts' own tokens too.

        Returns:
            `tuple(list[Answer], float)`: What each gets, and the seconds that it took.

        Raises:
            RuntimeError: The engine fails.
        """
        reply = self._ask({"prompts": prompts, "num_tokens": num_tokens, "score": score})
        return [Answer(**answer) for answer in reply["answers"]], reply["seconds"]

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("The process has no pipes.")
        print(json.dumps(job), file=stdin, flush=True)
        line = stdout.readline()
        reply = json.loads(line) if line else {"error": "The process ended."}
        if "error" in reply:
            raise RuntimeError(f"{reply['error']}\n{self._log.read_text()[-20_000:]}")
        return reply

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
