"""From nothing to a chat: trained, tuned on conversations, asked through a pipeline and a server, exported, asked."""

import json
import re
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeForCausalLM, pipeline
from typer.testing import CliRunner

from mot_cli import app
from mot_hf.data.chat import END_OF_TURN_TOKEN
from tests.ecosystem.test_serve import start_server
from tests.scripts.running import REPOSITORY
from tests.training.language_runs import SMALL, WORDS, write_text

pytest.importorskip("trl")
pytest.importorskip("fastapi")
pytest.importorskip("openai")

pytestmark = pytest.mark.slow

ANSWERS = {word: " ".join(WORDS[(number + place) % 16] for place in range(3)) for number, word in enumerate(WORDS[:6])}
TRAINING = {"per_device_train_batch_size": 8, "report_to": "none", "use_cpu": "true", "disable_tqdm": "true"}


def ask(word: str) -> dict[str, str]:
    return {"role": "user", "content": f"after {word}?"}


def run(*command: str, **arguments: Any) -> None:
    words = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    result = CliRunner().invoke(app, [*command, *words])
    assert result.exit_code == 0, (result.output, result.exception)


def write_chats(path: Path) -> str:
    """One question and its answer, or two in one conversation."""
    turns = [[ask(word), {"role": "assistant", "content": answer}] for word, answer in ANSWERS.items()]
    chats = [*turns, *(first + second for first in turns for second in turns)]
    path.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tuned model, and its export."""
    folder = tmp_path_factory.mktemp("chat")
    text = write_text(folder / "text")
    small = SMALL | {"num_hidden_layers": 2, "vocab_size": 320, "block_length": 64}
    run("train", **small, **TRAINING, source=text, output_dir=folder / "base", max_steps=5, save_strategy="no")
    tuning = {name: write_chats(folder / f"{name}.jsonl") for name in ("source", "validation_source")}
    tuning |= {"max_steps": 200, "learning_rate": 1e-2, "mixing": "moe"}
    run(
        "sft",
        **TRAINING,
        **tuning,
        model_name_or_path=folder / "base",
        output_dir=folder / "tuned",
        save_strategy="no",
    )
    run("export", str(folder / "tuned"), str(folder / "exported"))
    return folder


def converse(generator: Any) -> list[str]:
    """Ask one question after the other in one conversation of each two."""
    replies = []
    for first, second in zip(list(ANSWERS)[::2], list(ANSWERS)[1::2], strict=True):
        chat = [ask(first)]
        chat = generator(chat, do_sample=False, max_new_tokens=20)[0]["generated_text"]
        chat = generator([*chat, ask(second)], do_sample=False, max_new_tokens=20)[0]["generated_text"]
        replies += [message["content"] for message in chat if message["role"] == "assistant"]
    return replies


@pytest.mark.parametrize("name", ["tuned", "exported"])
def test_a_pipeline_answers_in_turns(folder: Path, name: str) -> None:
    generator = pipeline("text-generation", model=str(folder / name), device="cpu")
    assert converse(generator) == list(ANSWERS.values())


def test_the_export_is_a_plain_model_with_the_template(folder: Path) -> None:
    assert type(AutoModelForCausalLM.from_pretrained(folder / "exported")) is Qwen3MoeForCausalLM
    tokenizers = [AutoTokenizer.from_pretrained(folder / name) for name in ("tuned", "exported")]
    assert tokenizers[0].chat_template == tokenizers[1].chat_template is not None
    assert tokenizers[1].eos_token == END_OF_TURN_TOKEN


def test_a_server_answers_in_turns(folder: Path, tmp_path: Path) -> None:
    batching = ["--continuous-batching", "--cb-block-size", "8", "--cb-num-blocks", "32"]
    for server in start_server(tmp_path / "log.txt", *batching):
        for name in ("tuned", "exported"):
            settings = {"model": str(folder / name), "temperature": 0, "max_tokens": 20}
            chat: list[Any] = []
            for word, answer in list(ANSWERS.items())[:2]:
                chat.append(ask(word))
                reply = server.client.chat.completions.create(messages=chat, **settings).choices[0]
                assert (reply.message.content, reply.finish_reason) == (answer, "stop")
                chat.append({"role": "assistant", "content": reply.message.content})


def test_the_code_of_the_guide_runs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guide = (REPOSITORY / "docs" / "guides" / "instruction_tuning.md").read_text()
    first, preferences = re.findall(r"```python\n(.+?)```", guide, re.DOTALL)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "chat").symlink_to(folder / "tuned")
    with chdir(tmp_path):
        exec(first, {})
        assert capsys.readouterr().out.strip()
        for whole, part in (("[:400]", "[:8]"), ("max_steps=50", "max_steps=1")):
            assert whole in preferences
            preferences = preferences.replace(whole, part)
        names: dict[str, Any] = {}
        exec(preferences, names)
    assert names["trainer"].state.log_history[-1]["train_loss"] > 0
