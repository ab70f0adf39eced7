r"""Convert an exported model to GGUF with the converter from llama.cpp's source folder.

    mot export runs/moe runs/qwen3_moe
    python scripts/convert_gguf.py --llama_cpp llama.cpp --model_dir runs/qwen3_moe --output runs/moe.gguf

The converter must know the rule by which a tokenizer splits text into words. It recognises published tokenizers by the
ids of a test text. The tokenizers of mot_hf.data.tokenizer use GPT-2's rule, and this script tells the converter so.
The converter does everything else.
"""

import json
import runpy
import sys
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from transformers import HfArgumentParser, PreTrainedTokenizerFast

GPT2_RULE = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


@dataclass
class Arguments:
    """The model to convert, the converter and the output."""

    llama_cpp: str = field(metadata={"help": "folder of llama.cpp's source, with convert_hf_to_gguf.py"})
    model_dir: str = field(metadata={"help": "folder of a model that llama.cpp supports, such as Qwen3-MoE"})
    output: str = field(metadata={"help": "GGUF file to write"})
    outtype: str = field(
        default="auto", metadata={"help": "f32, f16, bf16 or q8_0; auto keeps the precision of the weights"}
    )


def cuts_like_gpt2(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Check whether a tokenizer splits text into words by GPT-2's rule, without changing the text first."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    rule = {name: value for name, value in (state["pre_tokenizer"] or {}).items() if name != "trim_offsets"}
    return state["model"]["type"] == "BPE" and state["normalizer"] is None and rule == GPT2_RULE


def answer_for_own_tokenizers(converter: type) -> None:
    """Make the converter accept every tokenizer that splits text like GPT-2's."""
    recognise = converter.get_vocab_base_pre

    def get_vocab_base_pre(self: object, tokenizer: PreTrainedTokenizerFast) -> str:
        return "gpt-2" if cuts_like_gpt2(tokenizer) else recognise(self, tokenizer)

    converter.get_vocab_base_pre = get_vocab_base_pre


def main(args: Arguments) -> None:
    """Run the converter as its own command would."""
    script = Path(args.llama_cpp) / "convert_hf_to_gguf.py"
    if not script.is_file():
        raise OSError(f"`llama_cpp={args.llama_cpp!r}` has no {script.name}: give the folder of llama.cpp's source.")
    sys.path.insert(0, str(script.parent.resolve()))
    answer_for_own_tokenizers(import_module("conversion.base").TextModel)
    sys.argv = [str(script), args.model_dir, "--outfile", args.output, "--outtype", args.outtype]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
