"""Folders that hold no model, as accidents and attackers leave them, by what was done to them."""

from typing import Any

import torch

from tests.damaging import (
    DEEP,
    ESCAPE,
    FIRST_SHARD,
    INDEX,
    WEIGHTS,
    Damage,
    add,
    change,
    claim,
    cut,
    enlarge,
    link,
    make_folder,
    make_pipe,
    move_out,
    put,
    remove,
    rename,
    retensor,
    shard,
    sharded,
    spoil,
    write,
)


def _config() -> dict[str, Damage]:
    """Values of config.json that are refused: of a MoT model, and by themselves."""
    default = {"rope_type": "default", "rope_theta": 10000.0}
    values: dict[str, list[Any]] = {
        "architectures": [
            *(
                "MoTForCausalLM",
                ["MoTPreTrainedModel"],
                ["os.system"],
                ["__name__"],
                [5],
                {"a": 1},
                [["x"]],
                [None],
                7,
            ),
            *(["MoTForCausalLM", "MoTModel"], [ESCAPE], ESCAPE, ["MoTForSequenceClassification"], True, [{}]),
        ],
        "model_type": [5, ["mot"], "bert", None, ESCAPE, {}, ""],
        "dtype": ["evil", "nn", 5, {"a": 1}, "int8", ESCAPE, "load", ["float32"]],
        "rope_parameters": [
            *({"rope_type": "evil"}, 5, {"rope_type": 5}, default | {"rope_theta": "x"}, default | {"rope_theta": 0}),
            *({"rope_type": "yarn"}, {"rope_type": ESCAPE}, "evil", {"rope_type": None}, {"rope_type": ["default"]}),
        ],
        "num_hidden_layers": [1, 3, 0, -1, "4", 4.5, 10**400, True, 2 * 10**9, [4], None],
        "vocab_size": [10**12, 299, -1, "300", 2**63, None, {}],
        "hidden_size": [10**12, 33, 0, "x", 2**40],
        "num_attention_heads": [10**9, 3, 0],
        "num_key_value_heads": [10**9, 3, 0, "x"],
        "head_dim": [10**18, 7, -2, 2**62],
        "hidden_act": ["evil", 5, ESCAPE, None],
        "max_position_embeddings": [0, "x", 1.5],
        "rms_norm_eps": [float("nan"), "x", float("inf")],
        "id2label": [5, {"a": "b"}, "x"],
        "num_labels": [10**9],
        "return_dict": [False],
        "quantization_config": [{"quant_method": "evil"}, 5],
        "attn_implementation": ["evil/kernel", "evil", 5],
        "validate": [5],
        "from_dict": [1],
        "__class__": ["x"],
        "attribute_map": [5, {"hidden_size": "vocab_size"}],
        "is_causal": [False],
        "pad_token_id": ["x", 1.5],
        "eos_token_id": [[[]], "x"],
        "attention_dropout": [1e309, "x"],
        "tie_word_embeddings": [True, "x"],
        "num_experts": [10**9, "8", 7, 0],
        "moe_intermediate_size": [10**15, 7],
        "num_experts_per_tok": [10**9, 0, "x"],
        "group_size": [10**18, 10**9, 1, "x"],
        "companion_momentum": [0, "x", float("nan")],
        "mixing": ["evil", 5, None],
        "mlp_layer_types": [["dense"] * 2, 5, ["evil"] * 2, [], ["sparse"] * 2, ESCAPE],
    }
    damages = {
        f"{name} = {str(value)[:30]!r}": change("config.json", **{name: value})
        for name, all_values in values.items()
        for value in all_values
    }
    damages["layers beyond counting"] = change("config.json", num_hidden_layers=2 * 10**9, mlp_layer_types=None)
    return damages


def _files() -> dict[str, Damage]:
    """What can stand in the place of a file that every model must have."""
    damages = {}
    for name in ("config.json", WEIGHTS):
        damages |= {
            f"{name} is a folder": make_folder(name),
            f"{name} is a pipe": make_pipe(name),
            f"{name} is a broken link": link(name, "nowhere"),
            f"{name} is a link to itself": link(name, name),
            f"{name} is a link out": move_out(name),
            f"{name} is a link to a device": link(name, "/dev/zero"),
            f"{name} is missing": remove(name),
            f"{name} is empty": write(name, b""),
            f"{name} is a page": write(name, "<html>404</html>" * 100),
            f"{name} is cut": cut(name, -7),
            f"{name} has only a beginning": cut(name, 9),
        }
    texts = {"a list": "[]", "a number": "5", "null": "null", "deep": DEEP, "a text": '"x"', "NULs": "\0" * 50}
    texts |= {"rather deep": '{"model_type": "mot", "a": ' + "[" * 500 + "]" * 500 + "}"}
    damages |= {f"config.json is {what}": write("config.json", text) for what, text in texts.items()}
    damages["config.json is not UTF-8"] = write("config.json", b'{"model_type": "mot\xff"}')
    damages["config.json has a long number"] = write("config.json", '{"model_type": ' + "1" * 10_000 + "}")
    damages["config.json has 3 GB"] = enlarge("config.json", 3 * 10**9)
    return damages


def _weights() -> dict[str, Damage]:
    """Weights that are not those of the configuration."""

    def claim_of(shape: list[Any], offsets: list[Any], dtype: str = "F32") -> Damage:
        return claim({"model.embed_tokens.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}})

    norm = "model.norm.weight"
    return {
        "weights lengthened": add(WEIGHTS, b"\0" * 64),
        "weights of 2 GB": enlarge(WEIGHTS, 2 * 10**9),
        "a header of 2**64 bytes": write(WEIGHTS, b"\xff" * 100),
        "a header that is deep": claim(DEEP.encode()),
        "a header of nothing": claim({}),
        "a header that is no object": claim([]),
        "a tensor of 2**63 numbers": claim_of([2**62, 2], [0, 2**63]),
        "a tensor of 4 TB": claim_of([10**6, 10**6], [0, 4 * 10**12]),
        "a tensor of negative size": claim_of([-1, 2], [0, 8]),
        "a tensor of another type": claim_of([0], [0, 0], "F4"),
        "a tensor outside": claim_of([2], [8, 0]),
        "no tensor": retensor(lambda tensors: tensors.clear()),
        "a tensor missing": put("self_attn.q_proj.weight", lambda tensor: None),
        "a tensor too many": retensor(lambda tensors: tensors.update(more=torch.zeros(3))),
        "a tensor with a bad name": retensor(lambda tensors: tensors.update({ESCAPE: torch.zeros(3)})),
        "a bias too many": retensor(lambda tensors: tensors.update({"model.norm.bias": torch.zeros(32)})),
        "a tensor turned": put("embed_tokens.weight", lambda tensor: tensor.T),
        "a tensor flat": put("embed_tokens.weight", lambda tensor: tensor.flatten()),
        "a tensor longer": put(norm, lambda tensor: torch.ones(len(tensor) + 1)),
        "a number in place of a tensor": put(norm, lambda tensor: torch.tensor(1.0)),
        "NaN": put("embed_tokens.weight", spoil(float("nan"))),
        "infinity": put("mlp.down_proj.weight", spoil(float("-inf"))),
        "all NaN": put(norm, lambda tensor: tensor * float("nan")),
        "whole numbers": put("embed_tokens.weight", lambda tensor: tensor.to(torch.int8)),
        "long numbers": put(norm, lambda tensor: tensor.long()),
        "8-bit numbers": put("embed_tokens.weight", lambda tensor: tensor.to(torch.float8_e4m3fn)),
        "truth": put(norm, lambda tensor: tensor > 0),
        "complex numbers": put(norm, lambda tensor: tensor.to(torch.complex64)),
        "weights as a pickle": lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin") and None,
    }


def _statistics() -> dict[str, Damage]:
    return {
        "mean_input [3, 3]": put("companions.mean_input", lambda tensor: torch.zeros(3, 3)),
        "num_batches_tracked [4]": put("companions.num_batches_tracked", lambda tensor: torch.zeros(4).long()),
        "a statistic missing": put("companions.log_mass", lambda tensor: None),
        "a statistic NaN": put("companions.mean_output", spoil(float("nan"))),
        "a statistic infinite": put("companions.log_mass", spoil(float("inf"))),
        "a statistic of whole numbers": put("companions.input_shift", lambda tensor: tensor.long()),
        "a count of parts": put("companions.num_batches_tracked", lambda tensor: tensor.float()),
        "counts of truth": put("companions.num_bucket_batches", lambda tensor: tensor > 0),
        "an expert missing": put("experts.down_proj", lambda tensor: tensor[:-1]),
        "experts missing": put("experts.gate_up_proj", lambda tensor: None),
    }


def _index() -> dict[str, Damage]:
    names: list[Any] = [
        "../x.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        5,
        None,
        [],
        "",
        ".",
        "..",
        "x\0.safetensors",
        FIRST_SHARD,
    ]
    names += [f"{ESCAPE}.safetensors", "config.json", "absent.safetensors", "/dev/zero"]
    maps: dict[str, Any] = {"a list": [], "nothing": None, "empty": {}, "a number": 5, "a text": "x"}
    return {
        **{f"an index with {str(name)[:20]!r}": rename(name) for name in names},
        **{
            f"an index that is {what}": shard(lambda index, v=v: index.update(weight_map=v))
            for what, v in maps.items()
        },
        "an index without metadata": shard(lambda index: index.pop("metadata")),
        "an index with other metadata": shard(lambda index: index.update(metadata=[5])),
        "an index that names more": shard(lambda index: index["weight_map"].update(more=FIRST_SHARD)),
        "an index that names less": shard(lambda index: index["weight_map"].popitem()),
        "an index that is deep": sharded(write(INDEX, DEEP)),
        "an index that is cut": sharded(cut(INDEX, -5)),
        "an index that is a pipe": sharded(make_pipe(INDEX)),
        "a shard that is a pipe": sharded(make_pipe(FIRST_SHARD)),
        "a shard that is missing": sharded(remove(FIRST_SHARD)),
        "a shard that is cut": sharded(cut(FIRST_SHARD, -1)),
        "a shard that is a link out": sharded(move_out(FIRST_SHARD)),
    }


def _tokenizer() -> dict[str, Damage]:
    """Tokenizers that cannot be read, or do not fit the model."""
    name, settings = "tokenizer.json", "tokenizer_config.json"
    token = {"id": 4 * 10**9, "content": "<new>", "special": True}
    token |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    texts = {"empty": "", "an object": "{}", "a list": "[]", "deep": DEEP, "a page": "<html>", "NULs": "\0" * 9}
    return {
        **{f"a tokenizer that is {what}": write(name, text) for what, text in texts.items()},
        **{f"settings that are {what}": write(settings, text) for what, text in texts.items() if what != "an object"},
        "a tokenizer that is cut": cut(name, 500),
        "settings that are cut": cut(settings, 20),
        "settings that are a number": write(settings, "5"),
        "a tokenizer that is a pipe": make_pipe(name),
        "settings that are a pipe": make_pipe(settings),
        "a chat template that is a pipe": make_pipe("chat_template.jinja"),
        "chat templates that are pipes": make_pipe("additional_chat_templates/x.jinja"),
        "a tokenizer that is a folder": make_folder(name),
        "a tokenizer that is a link out": move_out(name),
        "a vocabulary that is a link out": link("vocab.json", "/etc/passwd"),
        "a tokenizer without its file": remove(name),
        "a token far away": change(name, added_tokens=[token]),
        "a token of another kind": change(name, added_tokens=[5]),
        "a model of another kind": change(name, model={"type": "Evil"}),
        "no model": change(name, model=None),
        "merges of another kind": change(name, model={"type": "BPE", "vocab": {"a": 0}, "merges": [["b", "c"]]}),
        "a vocabulary of numbers": change(name, model={"type": "BPE", "vocab": 5, "merges": []}),
        "another normalizer": change(name, normalizer={"type": ESCAPE}),
        "an end that is a number": change(settings, eos_token=5),
        "an end that is new": change(settings, eos_token="<not there>"),
        "special tokens that are a number": change(settings, extra_special_tokens=5),
        "tokens that are a list": change(settings, added_tokens_decoder=[]),
        "tokens that are text": change(settings, added_tokens_decoder={"x": "y"}),
        "names that are a number": change(settings, model_input_names=5),
        "a class that is a number": change(settings, tokenizer_class=5),
        "code of others as a text": change(settings, auto_map="evil/repo--x.X"),
        "an end with escapes": change(settings, eos_token=ESCAPE),
    }  # fmt: skip


# Refused by all commands that read a MoT model.
REFUSED = _config() | _files() | _weights() | _statistics() | _index() | _tokenizer()
# For a dense model too, whose configuration has nothing of MoT.
_OF_MOT = ("num_experts", "moe_", "group_size", "companion", "mixing", "mlp_layer", "a statistic", "count", "num_b")
DENSE = {name: damage for name, damage in REFUSED.items() if not name.startswith(_OF_MOT)}
