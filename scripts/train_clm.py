r"""Train a causal MoT language model with the stock `Trainer`, from scratch or from a checkpoint.

The arguments are those of `TrainingArguments`, plus architecture, text and method. A recipe sets their defaults.

    python scripts/train_clm.py small_clm --output_dir runs/small_clm
    python scripts/train_clm.py small_clm --output_dir runs/small_clm_256 --num_experts 256

On several GPUs or machines, use a configuration from scripts/accelerate. To resume after an interruption:

    accelerate launch --config_file scripts/accelerate/ddp.yaml scripts/train_clm.py \
        medium_32e --output_dir runs/medium --source my_texts/ --resume_from_checkpoint true
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
    train_language_model,
)

if __name__ == "__main__":
    classes = (ModelArguments, CorpusArguments, TrainingArguments, MethodArguments)
    with report_errors(debug=take_debug(sys.argv)):
        train_language_model(*parse_arguments(classes), masked=False)
        end_processes()
