r"""Save a model that was trained without MoT layers as a dense Qwen3 model.

Makes the dense models of `benchmarks/upcycling`, with the recipes of the MoT models that they are compared with:

    python scripts/train_clm.py small_clm --output_dir runs/dense \
        --mlp_layer_types dense dense dense dense
    python -m scripts.benchmarks.upcycling.save_dense --model_dir runs/dense --output_dir runs/qwen3
"""

import inspect
from dataclasses import dataclass, field

from transformers import AutoTokenizer, HfArgumentParser, Qwen3Config, Qwen3ForCausalLM

from mot_hf import MoTConfig, MoTForCausalLM
from mot_hf.modeling.configuration_mot import find_layers


@dataclass
class Arguments:
    """Which model, and where to."""

    model_dir: str = field(metadata={"help": "folder of a causal model without MoT layers, with its tokenizer"})
    output_dir: str = field(metadata={"help": "folder to write"})


def main(args: Arguments) -> None:
    """Load the model, and save its parameters under the other configuration."""
    model = MoTForCausalLM.from_pretrained(args.model_dir)
    if find_layers(model.config, "sparse"):
        raise ValueError(
            f"`model_dir={args.model_dir!r}` is a model with MoT layers: give one that was trained without."
        )
    shared = inspect.get_annotations(MoTConfig).keys() & inspect.get_annotations(Qwen3Config).keys()
    dense = Qwen3ForCausalLM(Qwen3Config(**{name: getattr(model.config, name) for name in shared}))
    dense.load_state_dict(model.state_dict())
    dense.save_pretrained(args.output_dir)
    AutoTokenizer.from_pretrained(args.model_dir).save_pretrained(args.output_dir)


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
