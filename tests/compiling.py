"""The compiler in tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch


@contextmanager
def fresh_compiler() -> Iterator[None]:
    """Compile as if for the first time, and unwatched by coverage, which would follow the compiler at every call."""
    coverage = _find_coverage()
    if coverage:
        coverage.stop()
    torch.compiler.reset()
    try:
        yield
    finally:
        torch.compiler.reset()
        if coverage:
            coverage.start()


def _find_coverage() -> Any:
    """What measures coverage, if it is installed and does."""
    if find_spec("coverage") is None:  # as where only the checks of a GPU run
        return None
    from coverage import Coverage

    return Coverage.current()
