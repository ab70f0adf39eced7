"""The tests of `tests/gpu` on this device, by pytest; every outcome is stored as soon as it is known."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser
from xdist.workermanage import NodeManager

from scripts.benchmarks.gpu.record import FAILED, PartArguments, Record

ROOT = Path(__file__).parents[3]
# The cheapest and most telling ones first.
FILES = (
    "test_layer.py",
    "test_model.py",
    "test_saving.py",
    "test_generation.py",
    "test_attention.py",
    "test_training.py",
    "test_compilation.py",
)
MAX_WORKERS = 8
MAX_SECONDS = 60  # of one test


class Reporter:
    """A plugin of pytest that stores outcomes.

    Args:
        record (`Record`): Where.
    """

    def __init__(self, record: Record) -> None:
        self.record = record

    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        """Note how many tests there are."""
        self.record.content["num_tests"] = len(ids)
        self.record.write()

    def pytest_collectreport(self, report: Any) -> None:
        """Store why a test file cannot be read."""
        if report.failed:
            self.record.add(report.nodeid.split("/")[-1], FAILED, error=str(report.longrepr))

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Store the outcome of a test's call, and of its setup and teardown if they did not pass."""
        if report.when != "call" and report.outcome == "passed":
            return
        name = report.nodeid.split("/")[-1]
        if report.outcome == "skipped":
            reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.record.add(name, "skipped", note=reason)
        elif report.outcome == "failed":
            self.record.add(name, FAILED, error=str(report.longrepr))
        else:
            self.record.add(name, "passed")


def main(args: PartArguments) -> int:
    """Run the tests, several at a time; a worker that a test brings down is replaced. Returns pytest's exit code."""
    record = Record("checks", args)
    # On a request to stop, do not wait for workers that cannot.
    NodeManager.EXIT_TIMEOUT = 1  # pyright: ignore[reportAttributeAccessIssue]  # declared as the one value 10
    num_workers = max(1, min(MAX_WORKERS, (os.cpu_count() or 1) // 2))
    os.environ["MOT_GPU_CHECK_DEVICE"] = args.device
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(max(1, (os.cpu_count() or 1) // num_workers))
    options = ["-m", "gpu", "-v", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT]
    # `mot_hf` with its models comes first on the import path; the repository's own has none.
    options += ["--import-mode", "append", "-n", num_workers, "--maxschedchunk", 1]
    options += ["--timeout", MAX_SECONDS, "--timeout-method", "thread", "--color", "no"]
    options += ["--junitxml", record.path.with_suffix(".xml")]
    return pytest.main(
        [*map(str, options), *(str(ROOT / "tests" / "gpu" / name) for name in FILES)], [Reporter(record)]
    )


if __name__ == "__main__":
    sys.exit(main(*HfArgumentParser(PartArguments).parse_args_into_dataclasses()))
