"""Every test is offline, quiet, single-threaded and seeded, and leaves nothing in the user's caches."""

import gc
import os
import shutil
import tempfile
from importlib.metadata import version
from importlib.util import find_spec

_CACHE = tempfile.mkdtemp(prefix="mot_hf_tests_")
# Before the first import of a Hugging Face library, which reads them once.
os.environ.update(
    HF_HOME=_CACHE,
    HF_DATASETS_CACHE=os.path.join(_CACHE, "datasets"),
    HF_MODULES_CACHE=os.path.join(_CACHE, "modules"),
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
)

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from transformers.utils import logging  # noqa: E402

torch.set_num_threads(1)
logging.disable_progress_bar()
# A busy machine is no failure.
settings.register_profile("mot_hf", deadline=None)
settings.load_profile("mot_hf")


LIBRARIES = ("transformers", "torch", "accelerate", "datasets", "huggingface_hub", "lm_eval", "peft", "torchao", "trl")
VERSIONS = ", ".join(f"{name} {version(name)}" for name in LIBRARIES if find_spec(name))


def pytest_report_header() -> str:
    """Say which versions are tested."""
    return VERSIONS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say with which versions tests failed, where it is read."""
    if terminalreporter.stats.keys() & {"failed", "error"}:
        terminalreporter.write_line(f"Failed with {VERSIONS}.")


@pytest.fixture(autouse=True, scope="module")
def freeze_libraries() -> None:
    """Leave what is loaded out of garbage collection: each run of a `Trainer` looks through all that is not."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> None:
    """Seed torch, so that a model drawn in a test is the same in every run."""
    torch.manual_seed(0)


def pytest_unconfigure() -> None:
    """Remove the caches of this run."""
    shutil.rmtree(_CACHE, ignore_errors=True)
