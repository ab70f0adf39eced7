r"""Tune a causal language model on conversations with TRL's `SFTTrainer`, so that it answers in turns.

The arguments are those of TRL's `SFTConfig`, plus the model, the conversations and the method. A recipe sets their
defaults. By default, the conversations are about functions of Python's standard library: what one does, and its code.

    python scripts/sft.py sft --model_name_or_path runs/small_clm --output_dir runs/chat

To use your own, give for example a file of rows such as {"messages": [{"role": "user", "content": "..."}, ...]}, or
name the columns of prompts and answers. Replace `python` by `accelerate launch` to use all devices.

    python scripts/sft.py sft --model_name_or_path runs/small_clm --output_dir runs/chat \
        --source answers.jsonl --prompt_column question --completion_column answer --lora_rank 8
"""

import sys

from mot_cli.application import require, take_debug  # isort: skip  # first: it silences other libraries

from mot_hf.terminal import report_errors

if __name__ == "__main__":
    with report_errors(debug=take_debug(sys.argv)):
        require("sft", ("train", "sft"))
        from mot_hf.data.instructions import InstructionArguments
        from mot_hf.training import MethodArguments, end_processes, parse_arguments
        from mot_hf.training.instructions import SFTArguments, tune_on_instructions

        tune_on_instructions(*parse_arguments((InstructionArguments, SFTArguments, MethodArguments)))
        end_processes()
