"""Reading checkpoints tensor by tensor, after a look at all of their files."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from mot_hf.storage import checkpoint_files
from mot_hf.storage.checkpoint_files import CheckpointReader

INDEX = "model.safetensors.index.json"


def save_dense(folder: Path, *, tied: bool = False, max_shard_size: str = "20KB", dtype: str = "float32") -> Path:
    config = Qwen3Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=tied,
    )
    model = Qwen3ForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


@pytest.mark.parametrize("max_shard_size", ["20KB", "5GB"])
def test_headers_are_known_without_loading(max_shard_size: str, tmp_path: Path) -> None:
    reader = CheckpointReader(save_dense(tmp_path / "model", max_shard_size=max_shard_size, dtype="bfloat16"))
    assert reader.config["model_type"] == "qwen3"
    tensors = {
        name: tensor for path in reader.folder.glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    assert reader.names == sorted(tensors)
    for name, tensor in tensors.items():
        assert reader.shape(name) == tensor.shape
        assert reader.dtype(name) == tensor.dtype == torch.bfloat16
        assert torch.equal(reader.load(name), tensor)
    assert reader.count_bytes(reader.names) == sum(tensor.nbytes for tensor in tensors.values())
    assert reader.count_bytes(["model.norm.weight"]) == 2 * 32


def test_a_single_file_goes_before_shards_as_in_transformers(tmp_path: Path) -> None:
    folder = save_dense(tmp_path / "model")
    weights = Qwen3ForCausalLM.from_pretrained(save_dense(tmp_path / "other", max_shard_size="5GB")).state_dict()
    (tmp_path / "other" / "model.safetensors").rename(folder / "model.safetensors")
    reader, loaded = CheckpointReader(folder), Qwen3ForCausalLM.from_pretrained(folder).state_dict()
    for name, tensor in weights.items():
        assert torch.equal(reader.load(name), tensor)
        assert torch.equal(loaded[name], tensor)


def test_the_tensors_can_be_required_exactly(tmp_path: Path) -> None:
    reader = CheckpointReader(save_dense(tmp_path / "model"))
    shapes = {name: reader.shape(name) for name in reader.names}
    reader.require(shapes)
    with pytest.raises(ValueError, match=r"lacks extra\.weight\.$"):
        reader.require(shapes | {"extra.weight": (1,)})
    with pytest.raises(ValueError, match=r"another shape for model\.norm\.weight \[32\] instead of \[1, 32\]\.$"):
        reader.require(shapes | {"model.norm.weight": (1, 32)})
    with pytest.raises(ValueError, match=r"has unexpected tensors lm_head\.weight, .* \(25 in all\)") as error:
        reader.require({})
    assert len(str(error.value)) < 500


def drop_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def adapt(folder: Path) -> None:
    drop_config(folder)
    (folder / "adapter_config.json").write_text("{}")


def spoil_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "qw')


def empty_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def drop_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


def pickle_weights(folder: Path) -> None:
    drop_weights(folder)
    torch.save({}, folder / "pytorch_model.bin")


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def drop_shard(folder: Path) -> None:
    first_shard(folder).unlink()


def cut_shard(folder: Path) -> None:
    first_shard(folder).write_bytes(first_shard(folder).read_bytes()[:-7])


def empty_shard(folder: Path) -> None:
    first_shard(folder).write_bytes(b"")


def spoil_shard(folder: Path) -> None:
    first_shard(folder).write_bytes(b"<html>404</html>" * 100)


def leave_download(folder: Path) -> None:
    (folder / ".cache/huggingface/download").mkdir(parents=True)
    (folder / ".cache/huggingface/download/abc.incomplete").write_bytes(b"x")


def spoil_index(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {"lm_head.weight": 3}}')


def move_in_index(name: str) -> Callable[[Path], None]:
    def move(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        first, target = first_shard(folder), (folder / name).resolve()
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(first.read_bytes())
        index["weight_map"] = {
            key: name if shard == first.name else shard for key, shard in index["weight_map"].items()
        }
        (folder / INDEX).write_text(json.dumps(index))

    return move


def empty_index(folder: Path) -> None:
    (folder / INDEX).write_text('{"metadata": {}, "weight_map": {}}')


def strip_index(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({"weight_map": index["weight_map"]}))


def link_shard_out(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    first_shard(folder).rename(outside)
    (folder / f"{first_shard(folder).name.replace('00002-of', '00001-of')}").symlink_to(outside)


def lay_pipe(folder: Path) -> None:
    os.mkfifo(folder / "vocab.json")


def foreign_type(folder: Path) -> None:
    header = b'{"x":{"dtype":"F4","shape":[0],"data_offsets":[0,0]}}'
    first_shard(folder).write_bytes(len(header).to_bytes(8, "little") + header)


def add_to_index(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["more.weight"] = first_shard(folder).name
    (folder / INDEX).write_text(json.dumps(index))


def repeat_in_other_shard(folder: Path) -> None:
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    save_file(load_file(second) | {"model.embed_tokens.weight": load_file(first)["model.embed_tokens.weight"]}, second)


def add_to_shard(folder: Path) -> None:
    save_file(load_file(first_shard(folder)) | {"more.weight": torch.zeros(1)}, first_shard(folder))


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (drop_config, OSError, "model' has no config.json"),
        (adapt, ValueError, r"contains an adapter, not a model: merge it into its model \(`merge_and_unload`"),
        (spoil_config, ValueError, "config.json' is damaged: it is not JSON"),
        (empty_config, ValueError, "config.json' is damaged: it is not a JSON object"),
        (drop_weights, OSError, "has no model.safetensors and no model.safetensors.index.json: is the model fully"),
        (pickle_weights, OSError, r"only pytorch_model\.bin\. Convert it once"),
        (drop_shard, OSError, r"lacks model-00001-of-\d+\.safetensors, named in model.safetensors.index.json: repeat"),
        (cut_shard, ValueError, r"model-00001-of-\d+\.safetensors' is damaged or incomplete"),
        (empty_shard, ValueError, r"model-00001-of-\d+\.safetensors' is damaged or incomplete"),
        (spoil_shard, ValueError, r"model-00001-of-\d+\.safetensors' is damaged or incomplete"),
        (leave_download, ValueError, r"was interrupted and left .*abc\.incomplete: repeat it"),
        (spoil_index, ValueError, "index.json' is damaged: it has no `weight_map`"),
        (empty_index, ValueError, "index.json' is damaged: it has no `weight_map`"),
        (strip_index, ValueError, "index.json' is damaged: it has no `metadata`"),
        (move_in_index("../x.safetensors"), ValueError, r"names '\.\./x\.safetensors', but may only name files NAME"),
        (move_in_index("a/x.safetensors"), ValueError, "names 'a/x.safetensors', but may only name files NAME.s"),
        (
            move_in_index("x.bin"),
            ValueError,
            "names 'x.bin', but may only name files NAME.safetensors in its own folder",
        ),
        (link_shard_out, ValueError, r"model-00001-of-\d+\.safetensors' is a link out of its folder"),
        (lay_pipe, OSError, "vocab.json' is a pipe or a device, not a file of a model"),
        (foreign_type, ValueError, "has values of type F4, which transformers cannot read|damaged or incomplete"),
        (add_to_index, ValueError, r"disagrees with the shards about more\.weight"),
        (add_to_shard, ValueError, r"disagrees with the shards about more\.weight"),
        (repeat_in_other_shard, ValueError, r"disagrees with the shards about model\.embed_tokens\.weight"),
    ],
)
def test_a_damaged_checkpoint_is_refused_at_once(
    damage: Callable[[Path], None], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    folder = save_dense(tmp_path / "model")
    damage(folder)
    with pytest.raises(kind, match=message):
        CheckpointReader(folder)


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    for name in ("absent", "file"):
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match=f"{name}' is not a folder: give the local folder of a model"):
            CheckpointReader(tmp_path / name)


def test_values_that_are_no_finite_numbers_are_named(tmp_path: Path) -> None:
    folder = save_dense(tmp_path / "model")
    CheckpointReader(folder).require_finite()
    tensors = load_file(first_shard(folder))
    name, tensor = next(iter(tensors.items()))
    for value in (float("nan"), float("inf"), float("-inf")):
        spoilt = tensor.clone()
        spoilt.view(-1)[-1] = value
        save_file(tensors | {name: spoilt}, first_shard(folder))
        with pytest.raises(ValueError, match=rf"NaN or infinite values in {name}: its training"):
            CheckpointReader(folder).require_finite()


@pytest.mark.parametrize("place", [0, 7, 8, 31])
def test_every_value_is_looked_at(place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_files, "_CHUNK", 8)
    folder = save_dense(tmp_path / "model", max_shard_size="5GB")
    tensors = load_file(first_shard(folder))
    tensors["model.norm.weight"][place] = torch.nan
    save_file(tensors, first_shard(folder))
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        CheckpointReader(folder).require_finite()


def test_an_absolute_path_in_an_index_is_not_followed(tmp_path: Path) -> None:
    folder = save_dense(tmp_path / "model")
    move_in_index(str(tmp_path / "elsewhere" / "x.safetensors"))(folder)
    with pytest.raises(ValueError, match=r"names '/.*/elsewhere/x\.safetensors', but may only"):
        CheckpointReader(folder)
