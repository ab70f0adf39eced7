"""Which steps of reading a text have a progress bar."""

from collections.abc import Iterator
from contextlib import contextmanager

from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars


@contextmanager
def hide_bars() -> Iterator[None]:
    """Hides the progress bars of `datasets`: one for each small step says nothing. Also a decorator."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
