"""Models on their way to the Hub and back; a server on this machine stands in for the Hub."""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from mot_cli import app, run
from mot_hf import MoTConfig, MoTForCausalLM
from mot_hf.data.tokenizer import train_tokenizer
from mot_hf.hub import push_model
from mot_hf.registration import AUTO_CLASSES
from mot_hf.reporting.card import is_generated, write_card
from mot_hf.version import __version__
from tests import stranger
from tests.elsewhere import run_elsewhere
from tests.hub import HubServer
from tests.models import CODE, tiny_config, trained
from tests.scripts.running import REPOSITORY, run_forked, run_script, write_texts

MODEL = CODE | {"config.json", "generation_config.json", "README.md"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["def add(a, b):\n    return a + b\n" * 50], vocab_size=300)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A Hub, also for this process."""
    server = HubServer()
    with server.in_this_process():
        yield server
    server.close()


@pytest.fixture
def model_dir(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path / "model"
    trained(MoTForCausalLM(tiny_config(vocab_size=300))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_is_pushed_with_code_card_and_tokenizer_in_one_commit(hub: HubServer, model_dir: Path) -> None:
    before = {path.name: path.read_bytes() for path in model_dir.iterdir()}
    command = ["push", str(model_dir), "tester/small", "--message", "A small one"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert result.output == f"model uploaded to {hub.url}/tester/small\n"
    files = hub.files["tester/small"]
    assert files.keys() == MODEL | TOKENIZER | {"model.safetensors"}
    assert {name: files[name] for name in before} == before
    assert [summary for summary, _ in hub.commits] == ["A small one"]
    card = ModelCard(files["README.md"].decode())
    assert 'model_id = "tester/small"' in card.text
    assert card.data.pipeline_tag == "text-generation"
    assert is_generated(files["README.md"].decode())
    assert {path.name: path.read_bytes() for path in model_dir.iterdir()} == before
    assert not hub.repositories["tester/small"].is_private


def add_files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}" if name.endswith("json") else name)


OTHERS = (
    *("checkpoint-4/model.safetensors", "runs/Jan1/events.out.tfevents.1", "optimizer.pt", "rng_state_0.pth"),
    *(
        "training_args.bin",
        "trainer_state.json",
        "training.json",
        ".cache/x",
        "__pycache__/heads_mot.pyc",
        ".git/HEAD",
    ),
    *(
        "wandb/run-1/files/config.yaml",
        "pytorch_model_fsdp_0/__0_0.distcp",
        "model.safetensors.bak",
        ".env",
        "notes.md",
    ),
    *("model-00001-of-00002.safetensors", "model.safetensors.index.json", "secret.py", "texts/mine.txt", "tmpab12cd"),
    *(
        "additional_chat_templates/tools.py",
        "images/private.png",
        "pytorch_model.bin",
        "model.calibrated-0a1b2c3d.safetensors",
    ),
)


def test_only_what_belongs_to_a_model_is_pushed_and_the_rest_is_named(
    hub: HubServer, model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = ["images/a curve.png", "docs/more.md", "report.html", "additional_chat_templates/tools.jinja", "LICENSE"]
    kept += [
        "NOTICE.txt",
        "upcycling.json",
        "chat_template.jinja",
        ".eval_results/lambada.yaml",
        "logo.svg",
        "vocab.json",
    ]
    add_files(model_dir, *OTHERS, *kept)
    card = (
        "# Mine\n![curve](./images/a%20curve.png) [more](docs/more.md#part) <img src='logo.svg'> [no](../outside.md) "
        "[no](https://example.org/notes.md) [no](/etc/hosts.md) [no](.env.md) [no](secret.py) [gone](absent.md)\n"
    )
    (model_dir / "README.md").write_text(card)
    add_files(model_dir.parent, "outside.md", "model/.env.md")
    push_model(model_dir, "tester/small")
    assert hub.files["tester/small"].keys() == MODEL | TOKENIZER | {"model.safetensors", *kept}
    (told,) = [record.getMessage() for record in caplog.records if "Not uploaded" in record.getMessage()]
    assert told.endswith(": .cache/, .env, .env.md, .git/, __pycache__/, ... (25 in all).")


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "README.md", "heads_mot.py", "logo.svg", "docs/a.md"])
def test_no_link_out_of_the_folder_is_followed(name: str, hub: HubServer, model_dir: Path) -> None:
    (model_dir / "README.md").write_text("# Mine\n![logo](logo.svg) [more](docs/a.md)\n")
    secret = model_dir.parent / "outside" / Path(name).name
    secret.parent.mkdir()
    secret.write_bytes((model_dir / name).read_bytes() if (model_dir / name).exists() else b"a secret")
    (model_dir / name.split("/")[0]).unlink(missing_ok=True)
    (model_dir / name.split("/")[0]).symlink_to(secret.parent if "/" in name else secret)
    with pytest.raises(ValueError, match=r"is a link out of its folder, to .*: replace it with a copy"):
        push_model(model_dir, "tester/small")
    assert not hub.requests


def test_a_link_that_belongs_to_no_model_is_left(hub: HubServer, model_dir: Path) -> None:
    (model_dir / "link.txt").symlink_to("/etc/passwd")
    (model_dir / "images").symlink_to("/etc")
    push_model(model_dir, "tester/small")
    assert hub.files["tester/small"].keys() == MODEL | TOKENIZER | {"model.safetensors"}


def test_a_snapshot_in_the_cache_of_the_hub_is_pushed(hub: HubServer, model_dir: Path, tmp_path: Path) -> None:
    push_model(model_dir, "tester/small")
    snapshot = HfApi().snapshot_download("tester/small", cache_dir=tmp_path / "cache")
    assert (Path(snapshot) / "model.safetensors").is_symlink()
    push_model(snapshot, "tester/again")
    assert hub.files["tester/again"].keys() == hub.files["tester/small"].keys()
    assert hub.files["tester/again"]["model.safetensors"] == hub.files["tester/small"]["model.safetensors"]


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("auto_map", {"AutoModelForCausalLM": "evil/repo--heads_mot.MoTForCausalLM"}),
        (
            "auto_map",
            {"AutoModel": "modeling_mot.MoTModel", "AutoTokenizer": [None, "evil/repo--heads_mot.Tokenizer"]},
        ),
        ("auto_map", {"AutoModel": "other.MoTModel"}),
        ("auto_map", {"AutoModel": "../heads_mot.MoTModel"}),
        ("auto_map", {"AutoModel": 5}),
        ("auto_map", ["evil/repo--heads_mot.MoTForCausalLM", None]),
        ("custom_pipelines", {"evil": {"impl": "evil/repo--pipeline.Evil", "pt": ["AutoModel"]}}),
    ],
)
def test_code_of_others_is_refused(file: str, field: str, value: object, hub: HubServer, model_dir: Path) -> None:
    config = json.loads((model_dir / file).read_text())
    (model_dir / file).write_text(json.dumps(config | {field: value}))
    with pytest.raises(ValueError, match=rf"{file}' names .* in `{field}`. This is not the model's own code.*Remove"):
        push_model(model_dir, "tester/small")
    assert not hub.requests


@pytest.mark.parametrize(
    "auto_map", [{"AutoModelForCausalLM": "heads_mot.MoTForCausalLM"}, ["heads_mot.MoTForMaskedLM"]]
)
def test_an_incomplete_auto_map_is_completed(auto_map: object, hub: HubServer, model_dir: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    (model_dir / "heads_mot.py").write_text((model_dir / "heads_mot.py").read_text() + "# changed\n")
    push_model(model_dir, "tester/small")
    assert json.loads(hub.files["tester/small"]["config.json"]) == config
    assert hub.files["tester/small"]["heads_mot.py"].endswith(b"# changed\n")


def test_changed_code_is_pushed_with_what_it_imports_and_that_is_said(
    hub: HubServer, model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = "from .extra import something\n" + (model_dir / "heads_mot.py").read_text()
    (model_dir / "heads_mot.py").write_text(code)
    add_files(model_dir, "extra.py", "unused_mot.py")
    push_model(model_dir, "tester/small")
    assert hub.files["tester/small"]["heads_mot.py"] == code.encode()
    assert "extra.py" in hub.files["tester/small"]
    assert "unused_mot.py" not in hub.files["tester/small"]
    differs = f"differs from that of mot_hf {__version__} (extra.py, heads_mot.py), and is uploaded as it is"
    assert differs in caplog.text

    (model_dir / "experts_mot.py").unlink()  # then the code is not complete, and nobody could load the model by it
    push_model(model_dir, "tester/small")
    source = Path(sys.modules[MoTConfig.__module__].__file__ or "").parent
    assert hub.files["tester/small"]["heads_mot.py"] == (source / "heads_mot.py").read_bytes()

    (model_dir / "experts_mot.py").write_text("from ..secret import key\n")
    with pytest.raises(ValueError, match=r"imports '\.secret', which is not a file beside it"):
        push_model(model_dir, "tester/small")


def test_an_old_checkpoint_gets_the_code(hub: HubServer, model_dir: Path) -> None:
    for name in CODE:
        (model_dir / name).unlink()
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "auto_map"}))
    push_model(model_dir, "tester/small")
    assert json.loads(hub.files["tester/small"]["config.json"]) == config
    source = Path(sys.modules[MoTConfig.__module__].__file__ or "").parent
    assert {name: hub.files["tester/small"][name] for name in CODE} == {
        name: (source / name).read_bytes() for name in CODE
    }
    assert not CODE & {path.name for path in model_dir.iterdir()}


def test_someones_card_is_pushed_as_it_is_and_one_of_ours_with_the_new_name(hub: HubServer, model_dir: Path) -> None:
    write_card(model_dir, text_name="a text")
    push_model(model_dir, "tester/ours")
    card = hub.files["tester/ours"]["README.md"].decode()
    assert "Text: a text." in card
    assert 'model_id = "tester/ours"' in card
    assert "this folder" not in card
    assert 'model_id = "model"  # this folder, or its name on the Hub' in (model_dir / "README.md").read_text()
    (model_dir / "README.md").write_text("# Mine\n")
    push_model(model_dir, "tester/mine")
    assert hub.files["tester/mine"]["README.md"] == b"# Mine\n"


def test_a_model_without_a_tokenizer_is_pushed_and_that_is_said(
    hub: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    MoTForCausalLM(tiny_config()).save_pretrained(tmp_path / "model")
    with caplog.at_level(logging.WARNING):
        push_model(tmp_path / "model", "small", private=True)
    assert "holds no tokenizer" in caplog.text
    assert hub.repositories["tester/small"].is_private
    assert "without a tokenizer" in hub.files["tester/small"]["README.md"].decode()


def test_a_revision_leaves_the_main_branch_alone(hub: HubServer, model_dir: Path, tmp_path: Path) -> None:
    push_model(model_dir, "tester/small")
    first = hub.files["tester/small"]
    trained(MoTForCausalLM(tiny_config(vocab_size=300)), num_batches=1).save_pretrained(model_dir)
    address = push_model(model_dir, "tester/small", revision="second")
    assert address == f"{hub.url}/tester/small/tree/second"
    assert hub.files["tester/small"] == first
    assert hub.files_of("tester/small", "second")["model.safetensors"] != first["model.safetensors"]
    cache = tmp_path / "cache"
    for revision in ("main", "second"):
        path = HfApi().hf_hub_download("tester/small", "model.safetensors", revision=revision, cache_dir=cache)
        assert Path(path).read_bytes() == hub.files_of("tester/small", revision)["model.safetensors"]
    with pytest.raises(RevisionNotFoundError):
        HfApi().hf_hub_download("tester/small", "model.safetensors", revision="third", cache_dir=cache)


def test_weights_of_an_earlier_model_do_not_stay(hub: HubServer, model_dir: Path) -> None:
    push_model(model_dir, "tester/small")
    model = MoTForCausalLM.from_pretrained(model_dir)
    (model_dir / "model.safetensors").unlink()
    model.save_pretrained(model_dir, max_shard_size="50KB")
    push_model(model_dir, "tester/small")
    files = hub.files["tester/small"]
    assert "model.safetensors" not in files
    assert {name for name in files if "safetensors" in name} == {path.name for path in model_dir.glob("*safetensors*")}
    assert len(files) > len(MODEL | TOKENIZER) + 3


def test_what_has_not_changed_is_not_sent_again(hub: HubServer, model_dir: Path) -> None:
    push_model(model_dir, "tester/small")
    (model_dir / "LICENSE").write_text("new")
    push_model(model_dir, "tester/small")
    assert len(hub.uploads()) == 1
    assert [changed for _, changed in hub.commits][1] == ["LICENSE"]


def test_an_upload_that_fails_shows_nothing_and_goes_on_where_it_stopped(hub: HubServer, model_dir: Path) -> None:
    model = MoTForCausalLM.from_pretrained(model_dir)
    (model_dir / "model.safetensors").unlink()
    model.save_pretrained(model_dir, max_shard_size="50KB")
    shards = [path.name for path in model_dir.glob("model-*.safetensors")]
    assert len(shards) > 3

    # The storage refuses what comes after the first file, which huggingface_hub sees no sense in trying again.
    num_uploads = count()  # files are uploaded side by side
    hub.fault = lambda method, path: 403 if method == "PUT" and next(num_uploads) else None
    with pytest.raises(
        OSError, match=r"(?s)Error while uploading .* Repeat the command: what has arrived is not sent"
    ):
        push_model(model_dir, "tester/small")
    assert len(hub.objects) == 1
    assert hub.files["tester/small"] == {}
    (arrived,) = hub.objects

    # All files arrive, but the commit does not.
    hub.fault = lambda method, path: 500 if "/commit/" in path else None
    hub.requests.clear()
    with pytest.raises(OSError, match=r"(?s)The Hub refused 'tester/small': .*Repeat the command"):
        push_model(model_dir, "tester/small")
    assert hub.files["tester/small"] == {}
    assert arrived not in hub.uploads()
    assert len(hub.uploads()) == len(shards) - 1

    hub.fault = lambda method, path: None
    hub.requests.clear()
    push_model(model_dir, "tester/small")
    assert hub.uploads() == []
    assert set(shards) < hub.files["tester/small"].keys()
    assert len(hub.commits) == 1


def push_or_fail(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["push", *arguments])
    assert isinstance(result.exception, OSError | ValueError), result.exception
    return str(result.exception)


def test_what_the_user_can_mend_is_said(hub: HubServer, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "absent' is not a folder" in push_or_fail(str(model_dir / "absent"), "tester/small")
    assert "Repo id must" in push_or_fail(str(model_dir), "no name")
    assert not hub.requests
    assert "HF_TOKEN to a token with the permission" in push_or_fail(str(model_dir), "someone/else")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "does not let you write to 'tester/small' (401)" in push_or_fail(str(model_dir), "tester/small")
    assert "tester/small" not in hub.repositories
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    assert "The Hub did not answer" in push_or_fail(str(model_dir), "tester/small")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "offline" in push_or_fail(str(model_dir), "tester/small")
    (model_dir / "model.safetensors").unlink()
    assert "has no model.safetensors" in push_or_fail(str(model_dir), "tester/small")


def test_a_private_model_is_not_pushed_to_a_public_repository(hub: HubServer, model_dir: Path) -> None:
    push_model(model_dir, "tester/small")
    before = dict(hub.files["tester/small"])
    with pytest.raises(ValueError, match="`private=True`, but 'tester/small' exists and is public"):
        push_model(model_dir, "tester/small", private=True)
    assert hub.files["tester/small"] == before


def test_a_private_model_is_nobody_elses(hub: HubServer, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push_model(model_dir, "tester/small", private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_someone")
    with pytest.raises(RepositoryNotFoundError):
        HfApi().hf_hub_download("tester/small", "config.json", cache_dir=model_dir.parent / "cache")


@pytest.mark.slow
def test_an_upload_whose_process_is_killed_goes_on_where_it_stopped(hub: HubServer, model_dir: Path) -> None:
    model = MoTForCausalLM.from_pretrained(model_dir)
    (model_dir / "model.safetensors").unlink()
    model.save_pretrained(model_dir, max_shard_size="50KB")

    def push() -> None:
        (model_dir.parent / "process").write_text(str(os.getpid()))
        sys.argv = ["mot", "push", str(model_dir), "tester/small"]
        run()

    num_uploads = count()  # files are uploaded side by side

    def kill(method: str, path: str) -> int | None:
        if method != "PUT" or not next(num_uploads):
            return None
        while not hub.objects:
            time.sleep(0.01)
        os.kill(int((model_dir.parent / "process").read_text()), signal.SIGKILL)
        return 500

    hub.fault = kill
    status, written = run_forked(model_dir.parent, push)
    assert status == -signal.SIGKILL, written
    assert hub.files["tester/small"] == {}
    (arrived,) = hub.objects
    hub.fault = lambda method, path: None
    hub.requests.clear()
    assert run_forked(model_dir.parent, push)[0] == 0
    assert arrived not in hub.uploads()
    assert {path.name for path in model_dir.glob("model-*")} < hub.files["tester/small"].keys()


@pytest.mark.slow
def test_every_head_goes_round(hub: HubServer, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    expected = {}
    heads = {auto_class.__name__: head for auto_class, (head, _) in AUTO_CLASSES.items()}
    for name, head in heads.items():
        model = trained(head(tiny_config(vocab_size=300, num_labels=2)))
        model.save_pretrained(tmp_path / name)
        expected[name] = stranger.answer(name, model)
        if name == "AutoModelForCausalLM":
            expected["generated"] = model.generate(stranger.IDS[:2], max_new_tokens=8, do_sample=False)
    save_file(expected, tmp_path / "expected.safetensors")
    tokenizer.save_pretrained(tmp_path / "tokenizer")

    for name, head in heads.items():
        head.from_pretrained(tmp_path / name).push_to_hub(f"tester/small-{name}")
        tokenizer.push_to_hub(f"tester/small-{name}")
        files = hub.files[f"tester/small-{name}"]
        assert CODE | TOKENIZER | {"config.json", "model.safetensors", "README.md"} <= files.keys()
    run_elsewhere(tmp_path, stranger.__file__, "load_and_push", "tester/small", *heads, environment=hub.environment())
    for revision in ("main", "classifier"):
        assert hub.files_of("tester/small-trained", revision).keys() >= CODE

    pushed = load_file(tmp_path / "pushed.safetensors")
    revisions = {"AutoModelForCausalLM": "main", "AutoModelForSequenceClassification": "classifier"}
    assert pushed.keys() == revisions.keys()
    for name, revision in revisions.items():  # here no flag is needed
        model = getattr(transformers, name).from_pretrained("tester/small-trained", revision=revision)
        assert type(model) is heads[name]
        torch.testing.assert_close(stranger.answer(name, model.eval()), pushed[name])
    assert AutoTokenizer.from_pretrained("tester/small-trained").get_vocab() == tokenizer.get_vocab()


@pytest.mark.slow
def test_a_training_script_pushes_the_code_with_the_first_weights_and_our_card_last(
    hub: HubServer, tmp_path: Path
) -> None:
    write_texts(tmp_path / "texts", num_words=100)
    tiny = "--hidden_size 32 --num_attention_heads 2 --intermediate_size 64 --num_hidden_layers 2 --group_size 4"
    tiny += " --num_experts 8 --vocab_size 300 --source texts --block_length 16 --max_eval_rows 16 --max_steps 4"
    tiny += " --warmup_steps 0 --per_device_train_batch_size 8 --report_to none --eval_strategy no --save_steps 2"
    tiny += " --push_to_hub true --hub_strategy every_save --hub_model_id tester/clm --hub_always_push true"
    recipe = REPOSITORY / "mot_hf" / "recipes" / "small_clm.yaml"
    run_script(tmp_path, "train_clm.py", recipe, "--output_dir", "out", *tiny.split())
    with_weights = [changed for _, changed in hub.commits if "model.safetensors" in changed]
    assert set(with_weights[0]) > CODE
    files = hub.files["tester/clm"]
    assert is_generated(files["README.md"].decode())
    assert 'model_id = "tester/clm"' in files["README.md"].decode()
    assert files["README.md"] == (tmp_path / "out" / "README.md").read_bytes()
    assert os.fspath(tmp_path) not in files["README.md"].decode()
