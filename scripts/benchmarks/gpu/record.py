"""What the parts of the GPU check share: their arguments, and files that get every result as soon as it is known."""

import gc
import logging
import os
import subprocess
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from scripts.benchmarks.measuring import describe_machine
from scripts.benchmarks.results import write_json

logger = logging.getLogger(__name__)

MEASURED, FAILED, LEFT_OUT = "measured", "failed", "left out"


@dataclass
class PartArguments:
    """What `benchmarks/gpu` tells every part."""

    device: str = field(metadata={"help": "device"})
    scale: float = field(metadata={"help": "size of the work; 1 is the full size"})
    deadline: float = field(metadata={"help": "when the part must be done, in seconds since the epoch"})
    output_dir: str = field(metadata={"help": "folder for the results"})
    command: str = field(metadata={"help": "command of the whole check, for the record"})

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU, whose absolute times are worth storing."""
        return self.device.startswith("cuda")

    @property
    def dtype(self) -> str:
        """The dtype of measurements; many a CPU is slow in bfloat16."""
        return "bfloat16" if self.on_gpu else "float32"

    def scaled(self, size: int, step: int) -> int:
        """A size at this scale, as a multiple of `step`."""
        return max(1, round(size * self.scale / step)) * step


class Record:
    """The results of a part in `OUTPUT_DIR/PART.json`, which is complete after every case.

    Args:
        part (`str`): Name of the part.
        args (`PartArguments`): Its arguments.
    """

    def __init__(self, part: str, args: PartArguments) -> None:
        self.args, self.cases, self.path = args, [], Path(args.output_dir) / f"{part}.json"
        self.durations: dict[str, float] = {}
        self.content = {
            "part": part,
            "command": args.command,
            **describe(args.device),
            "arguments": {name: value for name, value in asdict(args).items() if name in ("device", "scale")},
            "cases": self.cases,
        }
        self.write()

    def measure(self, name: str, kind: str, seconds: float, work: Callable[[], dict[str, Any]]) -> None:
        """Do one case and store its results or why it failed, unless too little time is left for it.

        Args:
            name (`str`): Name of the case.
            kind (`str`): A name that cases which take about as long share.
            seconds (`float`): How long a case of this kind takes; used until one was done.
            work (`Callable`): Does it; returns the results.
        """
        if self.remaining() < self.durations.get(kind, seconds):
            self.add(name, LEFT_OUT, note="too little time was left")
            return
        print(f"{name} ...")
        start = time.time()
        try:
            results = work()
        except Exception as error:
            logger.exception("%s failed", name)
            self.add(name, FAILED, error=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
        else:
            self.add(name, MEASURED, **results)
        print(f"{name}: {time.time() - start:.1f} s")
        self.durations[kind] = max(self.durations.get(kind, 0.0), time.time() - start)
        gc.collect()
        if self.args.on_gpu:
            torch.cuda.empty_cache()

    def remaining(self) -> float:
        """Seconds until the deadline."""
        return self.args.deadline - time.time()

    def add(self, name: str, outcome: str, **details: Any) -> None:
        """Store a case."""
        self.cases.append({"name": name, "outcome": outcome, **details})
        self.write()

    def write(self) -> None:
        """Write the file as it is so far."""
        write_json(self.path, self.content)


def describe(device: str) -> dict[str, Any]:
    """The machine, and the versions of its software."""
    machine = describe_machine(device)
    versions = machine.pop("versions") | {"cuda": torch.version.cuda, "driver": None, "triton": None}
    if device.startswith("cuda"):
        machine |= {"cpu": describe_machine("cpu")["device"], "num_cpus": os.cpu_count()}
        machine["memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            versions["driver"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
            versions["triton"] = version("triton")
        except (OSError, subprocess.TimeoutExpired, PackageNotFoundError) as error:
            logger.warning("%s", error)
    return {"machine": machine, "versions": versions}
