r"""Check and measure on one GPU, in eight minutes, what a CPU cannot show. One command, and no network:

    python -m scripts.benchmarks.gpu.run --wheels DIR

Four parts, each in its own process and with its own time limit, so that none stops another:

- `checks` (110 s): the tests of `tests/gpu`: the layer against the loops of `tests/naive.py`, compiled training and
  decoding, CUDA graphs, caches, attention and experts implementations, training in bfloat16, saving;
- `layer` (120 s): one layer against the dense layer, plain einsums and Qwen3-MoE, eager and compiled;
- `model` (60 s): a training step and generation of whole models against the same;
- `training` (the rest): dense, MoT and Qwen3-MoE models of about equal FLOPs, trained on the Python code that is
  installed.

Every part stores each result at once, in checks.json, layer.json, model.json and training.json in --output_dir; beside
them are checks.xml (JUnit), training.png, log.txt with everything that was printed, and summary.txt. The exit code is
1 if a check failed or did not run, or if a part wrote nothing, and 2 without a GPU.

Only torch, transformers, pytest with pytest-xdist and pytest-timeout, matplotlib and rich must be installed. If other
packages are missing, such as `datasets`, put their wheels into a folder for --wheels; without them, only what needs
them fails. A dry run on a CPU, at a tenth of the size:

    python -m scripts.benchmarks.gpu.run --device cpu --scale 0.1
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from transformers import HfArgumentParser

ROOT = Path(__file__).resolve().parents[3]
GPU_RESULTS = Path(__file__).resolve().with_name("results")
# The script of each part, and the endings of the files that it leaves.
PARTS = {name: Path(__file__).resolve().with_name(f"{name}.py") for name in ("checks", "layer", "model", "training")}
ENDINGS = (".json", ".xml", ".png")
# Seconds from a part's deadline to the request to stop, on which pytest writes its report, and from there to the end.
GRACE = 5.0
NO_GPU = 2


@dataclass
class Arguments:
    """What is run, where, and for how long."""

    device: Literal["cuda", "cpu"] = field(default="cuda", metadata={"help": "device; cpu for a dry run"})
    scale: float = field(default=1.0, metadata={"help": "size of the work; 1 is the full size"})
    seconds: float | None = field(
        default=None, metadata={"help": "seconds for everything; by default 480, and 300 on a CPU"}
    )
    checks_seconds: float = field(default=110.0, metadata={"help": "seconds for part checks, at most"})
    layer_seconds: float = field(default=120.0, metadata={"help": "seconds for part layer, at most"})
    model_seconds: float = field(default=60.0, metadata={"help": "seconds for part model, at most"})
    parts: list[str] = field(default_factory=lambda: list(PARTS), metadata={"help": f"any of {', '.join(PARTS)}"})
    output_dir: str | None = field(
        default=None,
        metadata={"help": "folder for the results; by default results/ beside this file, runs/gpu on a CPU"},
    )
    wheels: str | None = field(default=None, metadata={"help": "folder of wheels that the parts need"})

    def __post_init__(self) -> None:
        """Refuse what cannot be run, before running anything."""
        on_cpu = self.device == "cpu"
        self.seconds = self.seconds or (300.0 if on_cpu else 480.0)
        self.output_dir = self.output_dir or ("runs/gpu" if on_cpu else str(GPU_RESULTS))
        if on_cpu and GPU_RESULTS in (folder := Path(self.output_dir).resolve(), *folder.parents):
            raise ValueError(f"`output_dir={self.output_dir!r}` is for the results of a GPU: choose another folder.")
        for part in self.parts:
            if part not in PARTS:
                raise ValueError(f"`parts` has {part!r}, which must be one of {', '.join(PARTS)}.")
        if self.scale <= 0 or self.seconds <= 0:
            raise ValueError(f"`scale={self.scale}` and `seconds={self.seconds}` must be greater than 0.")
        if self.wheels is not None and not list(Path(self.wheels).glob("*.whl")):
            raise ValueError(f"`wheels={self.wheels!r}` holds no file *.whl: check the path.")

    def limit(self, part: str) -> float:
        """Seconds that a part has at most; `training` has all that are left."""
        return float(getattr(self, f"{part}_seconds", self.seconds or 0.0))


@dataclass
class Outcome:
    """How a part ended.

    Args:
        part (`str`): Its name.
        ended (`str`): How its process ended.
        cases (`list[dict]`): What it stored.
        num_missing (`int`): Tests that did not run.
    """

    part: str
    ended: str
    cases: list[dict[str, Any]]
    num_missing: int = 0

    @property
    def failed(self) -> bool:
        """Whether the exit code says so: any check that did not pass, or a part without results."""
        is_wrong = self.part == "checks" and any(case["outcome"] == "failed" for case in self.cases)
        return is_wrong or self.num_missing > 0 or not self.cases

    def describe(self) -> str:
        """The part in one line."""
        counts = Counter(case["outcome"] for case in self.cases)
        words = [f"{number} {outcome}" for outcome, number in counts.items()] or ["wrote nothing"]
        if self.num_missing:
            words.append(f"{self.num_missing} not run")
        return f"{self.part:<9} {', '.join(words)}; {self.ended}"


def find_gpu(device: str) -> str | None:
    """Says what is wrong with the device, if anything."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return f"No GPU: torch {torch.__version__} finds no CUDA device. On a CPU: --device cpu --scale 0.1"
    return None


def link_packages(folder: Path) -> None:
    """Make `mot_hf` importable with its models, which otherwise only setup.py puts into their place.

    Links need no build tool, copy nothing and leave the checkout alone.
    """
    package = folder / "mot_hf"
    package.mkdir(parents=True)
    for path in [*(ROOT / "mot_hf").iterdir(), ROOT / "modeling"]:
        (package / path.name).symlink_to(path)


def install_wheels(wheels: str, target: Path) -> None:
    """Install the wheels of a folder, without their dependencies."""
    files = sorted(Path(wheels).glob("*.whl"))
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--target", target]
    done = subprocess.run([sys.executable, "-m", "pip", "install", *options, *files], capture_output=True, text=True)
    if done.returncode:
        print(f"wheels    not installed; the parts run without them\n{done.stdout}{done.stderr}")


def make_environment(folder: Path, args: Arguments) -> dict[str, str]:
    """The environment of the parts, with their caches and the import path in a folder."""
    link_packages(folder / "links")
    paths = [folder / "links", ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    if args.wheels is not None:
        # `datasets` takes modules in a folder of this name for installed ones; it would read all files of others.
        install_wheels(args.wheels, folder / "site-packages")
        paths.insert(1, folder / "site-packages")
    defaults = {"CUDA_VISIBLE_DEVICES": "0"}  # the `Trainer` would use all GPUs
    if args.device == "cpu":
        defaults["OMP_NUM_THREADS"] = "1"
    return {
        **defaults,
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONUNBUFFERED": "1",
        "HF_HOME": str(folder / "cache"),
        "HF_DATASETS_CACHE": str(folder / "cache" / "datasets"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }


def run_process(command: list[str], seconds: float, log: Path, environment: dict[str, str]) -> str:
    """Run a command until it ends or its time is up; says how it ended."""
    start = time.monotonic()
    with log.open("a") as output:
        output.write(f"$ {shlex.join(command)}\n")
        output.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        in_time = True
        try:
            process.wait(max(0.0, seconds - GRACE))
        except subprocess.TimeoutExpired:
            in_time = False
            process.send_signal(signal.SIGINT)
        finally:
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            end_group(process)
    took = f"{time.monotonic() - start:.0f} s"
    if not in_time:
        return f"stopped at its limit of {took}"
    return f"{took}" if process.returncode == 0 else f"{took}, exit code {process.returncode}"


def end_group(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    with suppress(ProcessLookupError):  # none is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_part(part: str, args: Arguments, seconds: float, environment: dict[str, str]) -> Outcome:
    """Run a part, and read what it stored."""
    folder = Path(args.output_dir).resolve()
    for ending in ENDINGS:
        (folder / f"{part}{ending}").unlink(missing_ok=True)
    options = {
        "--device": args.device,
        "--scale": args.scale,
        "--deadline": time.time() + seconds - 2 * GRACE,
        "--output_dir": folder,
        "--command": shlex.join(["python", "-m", "scripts.benchmarks.gpu.run", *sys.argv[1:]]),
    }
    words = [str(word) for option in options.items() for word in option]
    ended = run_process([sys.executable, str(PARTS[part]), *words], seconds, folder / "log.txt", environment)
    path = folder / f"{part}.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"cases": []}
    num_tests = len({case["name"] for case in record["cases"]})
    return Outcome(part, ended, record["cases"], max(0, record.get("num_tests", 0) - num_tests))


def summarise(outcomes: list[Outcome], log: Path) -> str:
    """A line for each part, the errors, and the end of the log if a part wrote nothing."""
    lines = [outcome.describe() for outcome in outcomes]
    for outcome in outcomes:
        for case in outcome.cases:
            what = f"{outcome.part}, {case['name']}"
            if "error" in case:
                lines.append(f"failed    {what}: {case['error'].strip().splitlines()[-1][:300]}")
            elif case["outcome"] == "measured" and "note" in case:
                lines.append(f"note      {what}: {case['note']}")
    if any(not outcome.cases for outcome in outcomes):
        lines += ["the end of the log:", *log.read_text(errors="replace").splitlines()[-15:]]
    return "\n".join(lines) + "\n"


def run_parts(args: Arguments, environment: dict[str, str], deadline: float) -> list[Outcome]:
    """Run the parts in turn, each with its share of the time that is left."""
    outcomes = []
    for part in (name for name in PARTS if name in args.parts):
        print(f"{part} ...", flush=True)
        outcomes.append(run_part(part, args, min(args.limit(part), deadline - time.monotonic()), environment))
        print(outcomes[-1].describe(), flush=True)
    return outcomes


def main(args: Arguments) -> int:
    """Run the parts, say how they ended, and return the exit code."""
    deadline = time.monotonic() + cast(float, args.seconds)
    if problem := find_gpu(args.device):
        print(problem)
        return NO_GPU
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "log.txt").write_text("")
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run_parts(args, make_environment(Path(folder), args), deadline)
    summary = summarise(outcomes, output_dir / "log.txt")
    (output_dir / "summary.txt").write_text(summary)
    print(f"\n{summary}results   {output_dir}")
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main(*HfArgumentParser(Arguments).parse_args_into_dataclasses()))
