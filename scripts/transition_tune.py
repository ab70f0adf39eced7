r"""Tune a MoT language model in mode `moe`: token choice with a load-balancing loss and the same parameters.

The loss in every mode is logged before, during and after tuning. The saved model answers in mode `moe`. To tune a
finished model:

    python scripts/transition_tune.py transition --model_name_or_path runs/small_clm \
        --output_dir runs/small_moe

To keep the optimizer's state, tune at the end of the training run instead: resume it from a checkpoint, or start it,
with `--transition_share`. With `--transition_mode per_sequence` it continues in that mode instead, which needs no
load-balancing loss; with `--transition_share 0` it runs in the new mode from the first step:

    python scripts/train_clm.py small_clm --output_dir runs/small_clm --transition_share 0.9
"""

import sys

from mot_cli.application import take_debug  # isort: skip  # first: it silences other libraries

from transformers import TrainingArguments

from mot_hf.terminal import report_errors
from mot_hf.training import (
    CorpusArguments,
    MethodArguments,
    ModelArguments,
    end_processes,
    parse_arguments,
    tune_transition,
)

if __name__ == "__main__":
    classes = (ModelArguments, CorpusArguments, TrainingArguments, MethodArguments)
    with report_errors(debug=take_debug(sys.argv)):
        tune_transition(*parse_arguments(classes))
        end_processes()
