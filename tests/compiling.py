"""The compiler in tests."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from coverage import Coverage


@contextmanager
def fresh_compiler() -> Iterator[None]:
    """Compile as if for the first time, and unwatched by coverage, which would follow the compiler at every call."""
    coverage = Coverage.current()
    if coverage:
        coverage.stop()
    torch.compiler.reset()
    try:
        yield
    finally:
        torch.compiler.reset()
        if coverage:
            coverage.start()
