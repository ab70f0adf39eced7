"""`MoTConfig`: defaults, what it derives, and that nothing wrong gets past it."""

import json
import logging
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import (
    StrictDataclassClassValidationError,
    StrictDataclassError,
    StrictDataclassFieldValidationError,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from mot_hf import MoTConfig, MoTForCausalLM, MoTModel
from mot_hf.modeling import configuration_mot
from tests.models import random_ids, tiny_config

OWN_FIELDS = [field for field in fields(MoTConfig) if field.name in vars(MoTConfig)["__annotations__"]]


def test_defaults_are_the_papers_medium_model() -> None:
    config = MoTConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (512, 8, 8)
    assert (config.group_size, config.num_experts, config.num_experts_per_tok) == (32, 256, 8)
    assert (config.intermediate_size, config.moe_intermediate_size) == (1408, 176)
    assert config.mlp_layer_types == ["dense"] * 4 + ["sparse"] * 4
    assert (config.mixing, config.inference_mixing) == ("cross_example", "per_sequence")
    with torch.device("meta"):
        num_parameters = MoTForCausalLM(config).num_parameters()
    assert num_parameters == pytest.approx(337e6, rel=0.05)


@pytest.mark.parametrize("field", OWN_FIELDS, ids=lambda field: field.name)
def test_every_field_is_documented_with_its_default(field: Any) -> None:
    entry = re.search(
        rf"^ {{4,8}}{field.name} \((?P<types>`[^)]*)\):\n(?P<text>(?: {{8,}}\S.*\n)+)", MoTConfig.__doc__ or "", re.M
    )
    assert entry, f"`{field.name}` is missing from the docstring"
    stated = re.search(r"defaults to (`?)(?P<value>[^`]+)\1$", entry["types"])
    if field.default is None:
        assert stated is None
    else:
        assert stated
        assert eval(stated["value"]) == field.default


def test_docstring_documents_no_other_field() -> None:
    arguments = (MoTConfig.__doc__ or "").split("Args:")[1].split("Raises:")[0]
    documented = re.findall(r"^ {4,8}(\w+) \(`", arguments, re.M)
    assert documented == [field.name for field in OWN_FIELDS]


@pytest.mark.parametrize(
    ("given_fields", "derived"),
    [
        ({"intermediate_size": 64, "group_size": 4, "num_experts": 8}, {"moe_intermediate_size": 32}),
        ({"group_size": 4, "num_experts": 8}, {"num_experts_per_tok": 2}),
        ({"group_size": 16, "num_experts": 8}, {"num_experts_per_tok": 1, "norm_topk_prob": False}),
        ({"num_experts_per_tok": 1}, {"norm_topk_prob": False}),
        ({"num_experts_per_tok": 2}, {"norm_topk_prob": True}),
        ({"num_experts_per_tok": 2, "norm_topk_prob": False}, {"norm_topk_prob": False}),
        ({"num_hidden_layers": 3}, {"mlp_layer_types": ["dense", "sparse", "sparse"]}),
        ({"num_hidden_layers": 1}, {"mlp_layer_types": ["sparse"]}),
        ({"num_key_value_heads": None}, {"num_key_value_heads": 4}),
        ({"hidden_size": 64}, {"head_dim": 16}),
        ({"moe_intermediate_size": 5, "head_dim": 6}, {"moe_intermediate_size": 5, "head_dim": 6}),
        ({"num_local_experts": 16}, {"num_experts": 16, "num_local_experts": 16}),
        ({"num_local_experts": 64}, {"num_experts_per_tok": 2, "moe_intermediate_size": 704}),
        ({"rope_theta": 500.0}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ({}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        ({"num_labels": 3}, {"num_labels": 3, "id2label": {i: f"LABEL_{i}" for i in range(3)}}),
    ],
)
def test_what_is_left_out_is_derived(given_fields: dict[str, Any], derived: dict[str, Any]) -> None:
    config = MoTConfig(**given_fields) if "num_local_experts" in given_fields else tiny_config(**given_fields)
    assert {name: getattr(config, name) for name in derived} == derived


def test_json_round_trip_keeps_every_field(tmp_path: Path) -> None:
    config = tiny_config(
        mixing="moe",
        inference_mixing="cross_example",
        is_causal=False,
        mlp_layer_types=["sparse", "dense", "dense", "sparse"],
        eos_token_id=[1, 2],
        bos_token_id=3,
        companion_momentum=0.25,
        norm_mixing_weights=True,
        live_companions=False,
        num_experts_per_tok=3,
        moe_intermediate_size=12,
        rope_theta=123.0,
        head_dim=6,
    )
    config.save_pretrained(tmp_path)
    for loaded in (MoTConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert isinstance(loaded, MoTConfig)
        assert [getattr(loaded, field.name) for field in OWN_FIELDS] == [
            getattr(config, field.name) for field in OWN_FIELDS
        ]


@pytest.mark.parametrize(
    ("mixing", "inference_mixing"),
    [("cross_example", "per_sequence"), ("per_sequence", "per_sequence"), ("moe", "moe")],
)
def test_a_model_answers_in_the_mode_that_goes_with_its_training(
    mixing: str, inference_mixing: str, tmp_path: Path
) -> None:
    assert MoTConfig(mixing=mixing).inference_mixing == inference_mixing
    assert MoTConfig(mixing=mixing, inference_mixing="per_sequence").inference_mixing == "per_sequence"
    for saved in ("cross_example", "per_sequence", "moe"):
        MoTConfig(mixing=saved).save_pretrained(tmp_path)
        assert MoTConfig.from_pretrained(tmp_path, mixing=mixing).inference_mixing == inference_mixing
    MoTConfig(mixing="per_sequence", inference_mixing="cross_example").save_pretrained(tmp_path)
    kept = MoTConfig.from_pretrained(tmp_path, mixing="per_sequence")
    assert kept.inference_mixing == "cross_example"
    both = MoTConfig.from_pretrained(tmp_path, mixing=mixing, inference_mixing="cross_example")
    assert (both.mixing, both.inference_mixing) == (mixing, "cross_example")


def test_a_name_that_is_nearly_a_field_is_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="transformers"):
        MoTConfig(num_expert=8, num_local_experts=8, problem_type="regression", finetuning_task="x", num_labels=3)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == "`MoTConfig` has no field `num_expert`: did you mean `num_experts`? It changes nothing."


def test_a_single_experts_weight_is_renormalised_only_on_request_and_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(configuration_mot.logger, "warning_once", told.append)
    tiny_config(num_experts_per_tok=1).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["norm_topk_prob"] is False
    tiny_config(num_experts=1, norm_topk_prob=True)  # the only expert of all has weight 1 in any case
    assert told == []
    tiny_config(num_experts_per_tok=1, norm_topk_prob=True).save_pretrained(tmp_path)
    (message,) = set(told)
    assert re.search(r"`num_experts_per_tok=1`.* does not train controllers. Set `norm_topk_prob=False`", message)
    told.clear()
    # As all models with one expert per token were saved before, and may have been tuned.
    assert MoTConfig.from_pretrained(tmp_path).norm_topk_prob is True
    assert set(told) == {message}
    told.clear()
    assert MoTConfig.from_pretrained(tmp_path, norm_topk_prob=False).norm_topk_prob is False
    assert MoTConfig.from_pretrained(tmp_path, num_experts_per_tok=2).norm_topk_prob is True
    assert told == []


def test_a_saved_configuration_is_changed_and_checked_as_a_whole(tmp_path: Path) -> None:
    tiny_config(mlp_layer_types=["sparse", "dense", "sparse", "dense"]).save_pretrained(tmp_path)
    for load in (MoTConfig.from_pretrained, AutoConfig.from_pretrained):
        fewer = load(tmp_path, num_hidden_layers=3)
        assert fewer.mlp_layer_types == ["sparse", "dense", "sparse"]
        other = load(tmp_path, num_hidden_layers=2, mlp_layer_types=["sparse"] * 2)
        assert other.mlp_layer_types == ["sparse"] * 2
        for changes, word in [({"num_hidden_layers": 5}, "num_hidden_layers"), ({"group_size": 1}, "group_size")]:
            with pytest.raises(StrictDataclassClassValidationError, match=word):
                load(tmp_path, **changes)
    config, unused = MoTConfig.from_pretrained(tmp_path, num_hidden_layers=1, rows=3, return_unused_kwargs=True)
    assert (config.mlp_layer_types, unused) == (["sparse"], {"rows": 3})


def test_a_model_of_the_first_layers_is_loaded_and_saved(tmp_path: Path) -> None:
    MoTForCausalLM(tiny_config()).save_pretrained(tmp_path / "four")
    MoTForCausalLM.from_pretrained(tmp_path / "four", num_hidden_layers=3).save_pretrained(tmp_path / "three")
    again = MoTForCausalLM.from_pretrained(tmp_path / "three")
    assert len(again.model.layers) == len(again.config.mlp_layer_types) == 3


def test_a_model_is_not_made_of_a_configuration_that_it_could_not_save() -> None:
    config = tiny_config()
    config.num_hidden_layers = 3
    with pytest.raises(StrictDataclassClassValidationError, match="mlp_layer_types"):
        MoTForCausalLM(config)


def test_the_configuration_in_memory_is_the_saved_one(tmp_path: Path) -> None:
    model = MoTForCausalLM(tiny_config())
    model.save_pretrained(tmp_path)
    loaded = MoTForCausalLM.from_pretrained(tmp_path)
    names = {"_name_or_path"}
    in_memory, again = ({k: v for k, v in m.config.to_dict().items() if k not in names} for m in (model, loaded))
    assert in_memory == again
    assert in_memory["auto_map"] == json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert len(in_memory["auto_map"]) == 7


def test_alias_is_saved_once(tmp_path: Path) -> None:
    MoTConfig(num_local_experts=64).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert "num_local_experts" not in text
    assert MoTConfig.from_pretrained(tmp_path).num_experts == 64


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vocab_size", "97"),
        ("hidden_size", 32.0),
        ("hidden_size", None),
        ("num_experts", "8"),
        ("num_experts_per_tok", 1.5),
        ("hidden_act", None),
        ("rms_norm_eps", "1e-6"),
        ("use_cache", "yes"),
        ("is_causal", None),
        ("tie_word_embeddings", 1),
        ("norm_topk_prob", "true"),
        ("mlp_layer_types", "sparse"),
        ("mlp_layer_types", [1, 2, 3, 4]),
        ("mixing", "cross-example"),
        ("mixing", None),
        ("inference_mixing", "batch"),
        ("eos_token_id", ["1"]),
        ("rope_parameters", 10000.0),
        ("companion_momentum", None),
    ],
)
def test_wrong_types_and_words_name_the_field(name: str, value: object) -> None:
    with pytest.raises(StrictDataclassFieldValidationError, match=rf"(?s)'{name}'.*{re.escape(str(value)[:12])}"):
        tiny_config(**{name: value})


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        *(
            ({name: value}, [f"`{name}`", "at least 1", str(value)])
            for name in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "max_position_embeddings",
                "num_experts",
                "moe_intermediate_size",
            )
            for value in (0, -3)
        ),
        *(({"group_size": value}, ["`group_size`", "at least 2", str(value)]) for value in (1, 0, -4)),
        *(({"num_experts_per_tok": value}, ["`num_experts_per_tok`", "(8)", str(value)]) for value in (0, -1, 9)),
        ({"moe_intermediate_size": None, "intermediate_size": 63}, ["`moe_intermediate_size`", "63 * 4 / 8", "64"]),
        ({"mlp_layer_types": ["dense"]}, ["`mlp_layer_types`", "(4)", "got 1"]),
        ({"mlp_layer_types": []}, ["`mlp_layer_types`", "(4)", "got 0"]),
        ({"mlp_layer_types": ["dense", "sparse", "moe", "dense"]}, ["`mlp_layer_types`", "'moe'"]),
        ({"num_key_value_heads": 3}, ["`num_key_value_heads`", "(3)", "(4)"]),
        ({"hidden_size": 34}, ["`hidden_size`", "(34)", "(4)"]),
        ({"hidden_size": 12}, ["`head_dim`", "even", "got 3"]),
        ({"head_dim": 7}, ["`head_dim`", "even", "got 7"]),
        ({"head_dim": 0}, ["`head_dim`", "got 0"]),
        ({"head_dim": -2}, ["`head_dim`", "got -2"]),
        ({"hidden_act": "swiglu"}, ["`hidden_act`", "'swiglu'"]),
        *(
            ({name: value}, [f"`{name}`", str(value)])
            for name in ("initializer_range", "router_initializer_range", "rms_norm_eps")
            for value in (0, -0.1, float("nan"), float("inf"))
        ),
        *(
            ({"router_aux_loss_coef": value}, ["`router_aux_loss_coef`", str(value)])
            for value in (-0.5, float("nan"), float("inf"))
        ),
        *(({"attention_dropout": value}, ["`attention_dropout`", str(value)]) for value in (-0.5, 1, float("nan"))),
        *(({"companion_momentum": v}, ["`companion_momentum`", str(v)]) for v in (0, 1.5, -0.1, float("nan"))),
        ({"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, ["`layer_types`", "'sliding_attention'"]),
        ({"sliding_window": 4}, ["`sliding_window` must be None, got 4"]),
        ({"sliding_window": 0}, ["`sliding_window` must be None, got 0"]),
        ({"use_sliding_window": True}, ["`use_sliding_window` must be False, got True"]),
        ({"attention_chunk_size": 8}, ["`attention_chunk_size` must be None, got 8"]),
    ],
    ids=str,
)
def test_values_out_of_range_name_the_field_and_the_value(overrides: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(StrictDataclassClassValidationError) as raised:
        tiny_config(**overrides)
    assert [word for word in words if word not in str(raised.value)] == []


# Many of them would be made into a list, or meet a kernel, before anything else looked at them.
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"num_hidden_layers": 2 * 10**9}, ["`num_hidden_layers`", "at most 10000", "2000000000"]),
        ({"num_labels": 10**9}, ["`num_labels`", "at most 1000000"]),
        ({"vocab_size": 10**30}, ["`vocab_size`", "at most 2147483647"]),
        ({"group_size": 10**400}, ["`group_size`", "at most"]),
        ({"moe_intermediate_size": 2**31}, ["`moe_intermediate_size`", "at most"]),
        ({"rms_norm_eps": 10**400}, ["`rms_norm_eps`", "finite"]),
        *(({key: value}, ["`dtype`", repr(value)]) for key in ("dtype", "torch_dtype") for value in ("evil", "int8")),
        *(({"dtype": value}, ["`dtype`", repr(value)]) for value in (5, ["float32"], "Tensor", torch.int32)),
        *(
            ({"rope_parameters": {"rope_type": value}}, ["`rope_parameters`", "rope_type", repr(value), "yarn"])
            for value in ("evil", 5, None)
        ),
        ({"rope_parameters": {"rope_type": ["default"]}}, ["list"]),
        ({"rope_scaling": {"type": "evil"}}, ["`rope_parameters`", "'evil'"]),
        *(
            ({"rope_parameters": {"rope_type": "default", "rope_theta": value}}, ["rope_theta", repr(value)])
            for value in (0, -1.0, "x", True, float("nan"), float("inf"))
        ),
        *(({"rope_theta": value}, ["rope_theta", repr(value)]) for value in (0, "x", None)),
        ({"rope_parameters": {"rope_type": "linear", "factor": "x"}}, ["factor", "'x'"]),
        ({"rope_parameters": {"rope_type": "linear"}}, ["`rope_parameters`", "factor"]),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": ["x"]}},
            ["long_factor", "['x']"],
        ),
    ],
    ids=lambda value: str(value)[:80],
)
def test_values_that_would_trip_others_up_are_refused_at_once(overrides: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(StrictDataclassClassValidationError) as raised:
        tiny_config(**overrides)
    assert [word for word in words if word not in str(raised.value)] == []


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", torch.float16, None])
def test_a_configuration_is_loaded_with_the_dtypes_that_models_are(tmp_path: Path, dtype: Any) -> None:
    tiny_config().save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, dtype=dtype).hidden_size == 32


def test_fields_of_other_models_that_leave_attention_full_are_harmless(tmp_path: Path) -> None:
    fields = {"use_sliding_window": False, "sliding_window": None, "layer_types": ["full_attention"] * 4}
    tiny_config(**fields, max_window_layers=28, attention_chunk_size=None).save_pretrained(tmp_path)
    assert MoTConfig.from_pretrained(tmp_path).layer_types == fields["layer_types"]
    assert tiny_config(layer_types=None, use_sliding_window=None).num_hidden_layers == 4


def test_a_window_set_later_is_refused_when_a_model_is_made() -> None:
    config = tiny_config()
    config.sliding_window = 4
    with pytest.raises(StrictDataclassClassValidationError, match="`sliding_window` must be None, got 4"):
        MoTModel(config)


def test_a_configuration_file_of_endless_layers_is_refused_at_once(tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    del saved["mlp_layer_types"]
    path.write_text(json.dumps(saved | {"num_hidden_layers": 2 * 10**9}))
    with pytest.raises(StrictDataclassClassValidationError, match="at most 10000"):
        MoTConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "rope_parameters",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2},
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0, "truncate": False},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        {"type": "linear", "factor": 2.0, "rope_theta": 5e5},
    ],
    ids=str,
)
def test_rotary_embeddings_of_every_type_run(rope_parameters: dict[str, Any]) -> None:
    model = MoTForCausalLM(tiny_config(rope_parameters=rope_parameters))
    assert model(random_ids(2, 5), mixing="moe").logits.isfinite().all()


@pytest.mark.parametrize("name", ["pad_token_id", "bos_token_id", "eos_token_id"])
@pytest.mark.parametrize("value", [97, 200, -1])
def test_a_token_outside_the_vocabulary_is_warned_of_and_does_no_harm(
    name: str, value: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(configuration_mot.logger, "warning_once", told.append)
    config = tiny_config(**{name: [1, value] if name == "eos_token_id" else value})
    (message,) = set(told)
    assert f"`{name}={value}` is not from 0 to vocab_size - 1 (96)" in message
    assert ("resize_token_embeddings" in message) is (value > 0)
    plain = MoTForCausalLM(tiny_config(**{name: None, "initializer_range": 0.02})).eval()
    plain.save_pretrained(tmp_path / "plain")
    model = MoTForCausalLM.from_pretrained(tmp_path / "plain", **{name: getattr(config, name)}).eval()
    if value < 0:  # which older versions of transformers refuse to save for generation
        model.generation_config.pad_token_id = None
    model.save_pretrained(tmp_path / "saved")
    loaded = MoTForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert getattr(loaded.config, name) == getattr(config, name)
    ids = random_ids(2, 5)
    with torch.no_grad():
        # Loaded weights lie elsewhere in memory, by which products on a CPU round differently.
        torch.testing.assert_close(loaded(ids).logits, plain(ids).logits)
    if name == "pad_token_id":
        # torch takes -1 for the last row, which would then never be trained.
        model.train()(torch.full((4, 3), 96), labels=torch.full((4, 3), 96)).loss.backward()
        gradient = model.model.embed_tokens.weight.grad
        assert gradient is not None
        assert gradient[96].any()
    ends = {"eos_token_id": value} if name == "eos_token_id" else {}
    assert loaded.generate(ids, max_new_tokens=3, do_sample=False, **ends).shape == (2, 8)


def test_setting_a_field_later_is_validated_too(tmp_path: Path) -> None:
    config = tiny_config()
    with pytest.raises(StrictDataclassFieldValidationError, match="mixing"):
        config.mixing = "both"
    config.group_size = 1
    with pytest.raises(StrictDataclassClassValidationError, match="group_size"):
        config.save_pretrained(tmp_path)


SIZES = st.one_of(st.integers(-2, 12), st.sampled_from([16, 64, 1.0, "8", None, True]))
REALS = st.one_of(st.floats(), st.integers(-1, 2), st.sampled_from(["0.1", None]))
WORDS = st.sampled_from(["dense", "sparse", "moe", 1])
TOKENS = st.one_of(st.none(), st.integers(-2, 100))
DRAWN = {
    **dict.fromkeys(
        [
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "group_size",
            "num_experts",
            "moe_intermediate_size",
            "num_experts_per_tok",
            "max_position_embeddings",
            "vocab_size",
        ],
        SIZES,
    ),
    **dict.fromkeys(
        [
            "initializer_range",
            "router_initializer_range",
            "rms_norm_eps",
            "attention_dropout",
            "router_aux_loss_coef",
            "companion_momentum",
        ],
        REALS,
    ),
    **dict.fromkeys(["mixing", "inference_mixing"], st.sampled_from(["cross_example", "per_sequence", "moe", "x"])),
    **dict.fromkeys(["pad_token_id", "bos_token_id"], TOKENS),
    "eos_token_id": st.one_of(TOKENS, st.lists(TOKENS, max_size=3)),
    "mlp_layer_types": st.one_of(st.none(), st.lists(WORDS, max_size=5)),
    "hidden_act": st.sampled_from(["silu", "gelu", "relu", "", "softmax", None]),
    "tie_word_embeddings": st.sampled_from([True, False, 0]),
}


@settings(max_examples=400)
@given(
    names=st.lists(st.sampled_from(sorted(DRAWN)), max_size=4, unique=True),
    data=st.data(),
)
def test_a_configuration_is_refused_or_builds_a_model(names: list[str], data: st.DataObject) -> None:
    overrides = {name: data.draw(DRAWN[name], label=name) for name in names}
    try:
        config = tiny_config(**overrides)
    except StrictDataclassError:
        return
    with torch.device("meta"):
        model = MoTForCausalLM(config)
    assert config.moe_intermediate_size is not None
    assert config.num_experts_per_tok is not None
    assert config.num_key_value_heads is not None
    if overrides.get("moe_intermediate_size") is None:
        assert config.moe_intermediate_size * config.num_experts == config.intermediate_size * config.group_size
    assert config.group_size >= 2
    assert 1 <= config.num_experts_per_tok <= config.num_experts
    assert len(config.mlp_layer_types) == config.num_hidden_layers == len(model.model.layers)
    assert config.num_attention_heads % config.num_key_value_heads == 0
    for kind, layer in zip(config.mlp_layer_types, model.model.layers, strict=True):
        assert layer.is_sparse == (kind == "sparse")
        if kind == "sparse":
            shape = (config.num_experts, config.hidden_size, config.moe_intermediate_size)
            assert layer.mlp.experts.down_proj.shape == shape
    assert MoTConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
