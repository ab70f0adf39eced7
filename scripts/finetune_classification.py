r"""Fine-tune a pretrained MoT model to classify sequences or tokens, and evaluate it on held-out texts.

The arguments are those of `TrainingArguments`, plus the model and the texts. A recipe sets their defaults. By default,
the texts are code from Python's standard library: which package is a function from, or what is the role of each token?

    python scripts/finetune_classification.py finetune/sequence \
        --model_name_or_path runs/small_clm --output_dir runs/finetune/packages
    python scripts/finetune_classification.py finetune/tokens \
        --model_name_or_path runs/small_clm --output_dir runs/finetune/roles

To use your own texts, give for example a file of rows such as {"review": "...", "stars": 4}. For `finetune/tokens`,
the columns contain lists of words and lists of their labels. Replace `python` by `accelerate launch` to use all
devices.

    python scripts/finetune_classification.py finetune/sequence \
        --model_name_or_path runs/small_clm --output_dir runs/finetune/reviews \
        --source reviews.jsonl --text_column review --label_column stars
"""

import sys

from mot_cli.application import take_debug  # isort: skip  # first: it silences other libraries

from transformers import TrainingArguments

from mot_hf.data.classification import ClassificationArguments
from mot_hf.terminal import report_errors
from mot_hf.training import MethodArguments, end_processes, finetune_and_evaluate, parse_arguments

if __name__ == "__main__":
    with report_errors(debug=take_debug(sys.argv)):
        finetune_and_evaluate(*parse_arguments((ClassificationArguments, TrainingArguments, MethodArguments)))
        end_processes()
