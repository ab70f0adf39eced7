"""Checks that a resumed run is trained on the rows that it began with."""

import hashlib
import json
import logging
from typing import Any, cast

from datasets import Dataset
from datasets.formatting import query_table
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

logger = logging.getLogger(__name__)

# Rows that stand for all others: the first ones.
_NUM_DIGESTED = 64


class RowsCheck(TrainerCallback, ExportableState):
    """Warns if a resumed run has other training rows than its checkpoint, or masks another fraction of their tokens.

    The `Trainer` skips as many batches as the checkpoint has seen, whatever is in them. Every checkpoint holds the
    number of rows and a digest of the first ones; of streamed rows neither is known, and nothing is checked.
    """

    def __init__(self) -> None:
        self.rows: dict[str, Any] = {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"args": {}, "attributes": {"rows": self.rows}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare the rows with those of the checkpoint."""
        saved = cast(dict[str, Any], state.stateful_callbacks).get(type(self).__name__)
        before = saved["attributes"]["rows"] if isinstance(saved, dict) and state.global_step else {}
        self.rows = describe_rows(kwargs.get("train_dataloader"))
        names = [name for name in self.rows if name in before and before[name] != self.rows[name]]
        if names and state.is_world_process_zero:
            changes = {name: f"{name}={self.rows[name]!r} in place of {before[name]!r}" for name in names}
            if "digest" in changes:
                changes["digest"] = f"the first {_NUM_DIGESTED} rows are others"
            logger.warning(
                "The run goes on with other training rows than it began with: %s. Those that it skips as done are not "
                "those that it was trained on.",
                "; ".join(changes.values()),
            )


def describe_rows(dataloader: Any) -> dict[str, Any]:
    """Describes training rows in a few words.

    Args:
        dataloader (`DataLoader` or `None`): The `Trainer`'s batches.

    Returns:
        `dict[str, Any]`: `num_rows`, `digest`, and `mlm_probability` if tokens are masked. Empty for rows that are no
        `datasets.Dataset`.
    """
    rows = getattr(dataloader, "dataset", None)
    if not isinstance(rows, Dataset):
        return {}
    # As stored, without images and transforms. `with_format` would copy a transform.
    first = query_table(rows.data, range(min(_NUM_DIGESTED, len(rows))), indices=rows._indices)
    digest = hashlib.sha256(json.dumps(first.to_pydict(), sort_keys=True, default=str).encode()).hexdigest()[:16]
    collator, fraction = dataloader.collate_fn, "mlm_probability"
    masks = getattr(collator, "mlm", False) and hasattr(collator, fraction)
    return {"num_rows": len(rows), "digest": digest} | ({fraction: getattr(collator, fraction)} if masks else {})
