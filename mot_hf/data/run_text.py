"""The text to try a saved model on: by default the one that it was trained on."""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mot_hf.data.corpus import load_groups
from mot_hf.data.sources import name_source
from mot_hf.storage.record import read_record

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"checkpoint-\d+")


@dataclass(frozen=True)
class RunText:
    """A text, and whose it is.

    Args:
        options (`Mapping[str, Any]`): Arguments of [`load_corpus`] that read it.
        run_dir (`Path`, *optional*): Folder of the run that recorded it; `None` if it was named or is the default.
    """

    options: Mapping[str, Any]
    run_dir: Path | None = None

    @property
    def name(self) -> str:
        """Name of the text that is held out."""
        return name_source(self.options.get("validation_source") or self.options.get("source"))

    def load_groups(self, tokenizer: PreTrainedTokenizerBase, split: str, **sizes: Any) -> Iterator[dict[str, Tensor]]:
        """Reads groups of rows, see [`load_groups`]; an error says whose text it is.

        Args:
            tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
            split (`str`): `"train"` or `"validation"`.
            sizes: Further arguments of [`load_groups`].

        Yields:
            `dict[str, torch.Tensor]`: `input_ids` and `labels` `[G, T]`.

        Raises:
            OSError: The text does not exist any more.
            ValueError: It cannot be read as groups of rows.
        """
        try:
            yield from load_groups(tokenizer, split=split, **{"source": None, **self.options, **sizes})
        except (OSError, ValueError) as error:
            if self.run_dir is None:
                raise
            kind = OSError if isinstance(error, OSError) else ValueError
            raise kind(
                f"{error} By its training.json, {str(self.run_dir)!r} was trained on this text: name other text with "
                "--source."
            ) from error


def find_text(model_dir: str | os.PathLike[str], source: str | None = None) -> RunText:
    """Finds the text to try a model on.

    Args:
        model_dir (`str` or `os.PathLike`): Folder of the model; of a checkpoint, the folder of its run counts too.
        source (`str`, *optional*): Text to take instead, see [`load_corpus`].

    Returns:
        [`RunText`]: `source`; else the text in the record of the run; else Python's standard library.

    Raises:
        ValueError: The record of the run is damaged.
    """
    if source is not None:
        return RunText({"source": source})
    folder = Path(model_dir).resolve()
    for run_dir in (folder, folder.parent) if _CHECKPOINT.fullmatch(folder.name) else (folder,):
        record = read_record(run_dir)
        if record is not None and record.text:
            return RunText(record.text, run_dir)
    return RunText({"source": None})


@cache
def warn_of_long_rows(block_length: int, longest: int) -> None:
    """Warns of rows that are longer than those that a model is meant for, once.

    Args:
        block_length (`int`): Tokens in a row.
        longest (`int`): The model's `max_position_embeddings`.
    """
    if block_length > longest:
        logger.warning(
            "Rows of `block_length=%d` tokens are longer than the model is meant for: set --block-length to %d or "
            "less.",
            block_length,
            longest,
        )
