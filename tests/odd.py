"""Folders of models that are odd in what a command may do without, by what was done to them."""

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.damaging import (
    DEEP,
    ESCAPE,
    Damage,
    change,
    make_folder,
    make_pipe,
    remove,
    retensor,
    shard,
    state,
    write,
)


def _logs() -> dict[str, Damage]:
    """Logs of runs, which the card and the report do without."""
    step = {"step": 8, "loss": 1.0, "learning_rate": 0.1}
    entries = {
        "no step": ({"loss": 1.0},),
        "a null loss": (step, step | {"loss": None}),
        "a loss of text": (step | {"loss": ESCAPE},),
        "no entries": (5, None, [], "x"),
        "a step of text": (step | {"step": "8"},),
        "NaN": (step | {"loss": float("nan")},),
        "infinity": (step | {"eval_loss": float("inf")},),
        "great numbers": (step | {"loss": 10**400, "eval_loss": 1e300},),
        "a step far away": (step | {"step": 10**30},),
        "a rate of text": (step | {"learning_rate": ESCAPE},),
        "layers far away": (step | {f"mixing/entropy/layers_{'9' * 99}": 1.0},),
        "values of values": (step | {"x": {"y": []}},),
        "an evaluation of text": (step | {"eval_loss": 1.0, "eval_perplexity": "x", "eval_macro_f1": None},),
        "a negative loss": (step | {"eval_loss": -1e9},),
        "a great loss": (step | {"eval_loss": 1e9},),
    }
    return {
        **{f"a log with {what}": state(*some) for what, some in entries.items()},
        **{f"a log that is {what}": write("trainer_state.json", text) for what, text in ODD_TEXTS.items()},
        "a log of many steps": state(step, global_step=10**30, max_steps="x"),
        "a log that is a pipe": make_pipe("trainer_state.json"),
    }


def _records() -> dict[str, Damage]:
    """What stands beside a model and only its card needs."""
    records: dict[str, dict[str, Any]] = {
        "hyperparameters of a list": {"hyperparameters": []},
        "processes of text": {"num_processes": "2"},
        "a text that is a number": {"text_name": 5},
        "a field too many": {"more": 1},
        "a step of text": {"best_step": "x"},
        "a base of a list": {"base_model": []},
        "escapes": {"text_name": ESCAPE, "hyperparameters": {ESCAPE: ESCAPE}},
        "depth": {"hyperparameters": {"a": [[[{}]]]}},
        "a base with escapes": {"base_model": f"a/{ESCAPE}"},
    }
    return {
        **{f"a record with {what}": write("training.json", json.dumps(value)) for what, value in records.items()},
        **{f"a record that is {what}": write("training.json", text) for what, text in ODD_TEXTS.items()},
        **{f"a receipt that is {what}": write("upcycling.json", text) for what, text in ODD_TEXTS.items()},
        "a receipt of a number": write("upcycling.json", '{"source": 5}'),
        "a card that is not UTF-8": write("README.md", b"\xff\xfe"),
        "a card that is a folder": make_folder("README.md"),
        "a card that is a pipe": make_pipe("README.md"),
    }


def _generation() -> dict[str, Damage]:
    """Settings of generation, which are saved with a model."""
    values: dict[str, list[Any]] = {
        "temperature": ["x", -1],
        "eos_token_id": [{"a": 1}, [10**30]],
        "max_new_tokens": [-1, "x"],
        "cache_implementation": [5],
        "mixing": ["moe"],
        "validate": [5],
        "num_beams": [10**18],
        "stop_strings": [5],
        "watermarking_config": [5, {"x": 1}],
    }
    return {
        **{f"generation by {what}": write("generation_config.json", text) for what, text in ODD_TEXTS.items()},
        **{
            f"generation with {key} = {value!r}": write("generation_config.json", json.dumps({key: value}))
            for key, some in values.items()
            for value in some
        },
        "generation by a folder": make_folder("generation_config.json"),
    }


def _odd() -> dict[str, Damage]:
    """What a command may do without, ignore, or name."""
    name, settings = "tokenizer.json", "tokenizer_config.json"
    endless = {"strategy": {"Fixed": 10**10}, "direction": "Right", "pad_to_multiple_of": None}
    endless |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    return {
        "an adapter": write("adapter_config.json", "{}"),
        "a download that goes on": write("x.incomplete", "x"),
        "a file with a bad name": write("\x1b[31m.txt", "x"),
        "a file with a name of bytes": write(os.fsdecode(b"\xff.txt"), "x"),
        "code that is missing": remove("heads_mot.py"),
        "checkpoints that are none": write("checkpoint-9", "x"),
        "no tokenizer": remove(name, settings),
        "no statistics": retensor(lambda tensors: _drop(tensors, "companions")),
        "weights of TensorFlow": retensor(lambda tensors: None, {"format": "tf"}),
        "weights without metadata": retensor(lambda tensors: None, {}),
        "weights of 16 bits": retensor(_halve),
        "shards": shard(lambda index: None),
        "padding without end": change(name, padding=endless),
        "no pre-tokenizer": change(name, pre_tokenizer=None),
        "no decoder": change(name, decoder=None),
        "a length of text": change(settings, model_max_length="x"),
        "a template that is a number": change(settings, chat_template=5),
        "a template with escapes": change(settings, chat_template=ESCAPE),
        "code of others": change(settings, auto_map={"AutoTokenizer": ["evil/repo--x.X", None]}),
        "another side": change(settings, padding_side="evil"),
        "another class": change(settings, tokenizer_class="BertTokenizer"),
        "a class that is none": change(settings, tokenizer_class=ESCAPE),
        "special tokens of a list": write("special_tokens_map.json", "[]"),
        "added tokens of a list": write("added_tokens.json", "[]"),
        "keys twice": write_keys_twice,
        "a mark before config.json": write_mark,
        **{f"config with {key} = {value!r}": change("config.json", **{key: value}) for key, value in ODD_SETTINGS},
    }


def _drop(tensors: dict[str, Tensor], part: str) -> None:
    for name in [name for name in tensors if part in name]:
        del tensors[name]


def _halve(tensors: dict[str, Tensor]) -> None:
    tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items() if tensor.is_floating_point()})


ODD_TEXTS = {
    "an object": "{}",
    "a list": "[]",
    "a number": "5",
    "cut": '{"a',
    "deep": DEEP,
    "empty": "",
    "null": "null",
}
ODD_SETTINGS = [
    *(("auto_map", 5), ("auto_map", {"AutoModel": "evil/repo--x.X"}), ("auto_map", {"AutoConfig": ESCAPE})),
    *(("tokenizer_class", "evil"), ("tokenizer_class", 5), ("model_name", 5), ("transformers_version", 5)),
    *(("output_hidden_states", True), ("output_attentions", True), ("per_layer_config", 5), ("sub_configs", 5)),
    *(("intermediate_size", 10**15), ("intermediate_size", 65), ("max_position_embeddings", 1), ("label2id", 5)),
    *(("max_position_embeddings", 10**400), ("max_position_embeddings", 2**62), ("initializer_range", float("inf"))),
    *(("architectures", []), ("architectures", None), ("torch_dtype", "evil"), ("name_or_path", 5), ("id2label", {})),
    *(("problem_type", "evil"), ("_attn_implementation", "evil"), ("use_cache", "x"), ("layer_types", ["x"] * 2)),
    *(("experts_implementation", "evil"), ("rope_scaling", 5), ("rope_theta", "x"), ("base_model_tp_plan", 5)),
    *(("rope_parameters", {"rope_type": "dynamic", "factor": 1e308, "rope_theta": 1e4}), ("rope_parameters", {})),
    *(("rope_parameters", {"rope_type": "longrope", "short_factor": [1], "long_factor": [1]}), ("group_size", 2)),
    *(("rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e-300}), ("is_encoder_decoder", True)),
    *(("output_router_logits", True), ("router_aux_loss_coef", 1e300), ("extra_files", 5), (ESCAPE, ESCAPE)),
    ("pad_token_id", 10**9),
]  # fmt: skip


def write_keys_twice(folder: Path) -> None:
    """Let every key of config.json stand there twice."""
    text = (folder / "config.json").read_text().strip()
    write("config.json", f"{text[:-1]}, {text[1:]}")(folder)


def write_mark(folder: Path) -> None:
    """Let config.json begin with a byte-order mark."""
    write("config.json", "\ufeff" + (folder / "config.json").read_text())(folder)


LOGS, RECORDS, GENERATION, ODD = _logs(), _records(), _generation(), _odd()
