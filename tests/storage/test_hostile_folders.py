"""The commands on folders as accidents and attackers leave them: they work, or say in one line what is wrong.

A folder is given to one of the commands, which take turns: all of them read it in the same way. To try every folder
with every command, set `MOT_HF_EVERY_COMMAND=1`.
"""

import contextlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from mot_cli import run
from mot_hf import MoTForCausalLM
from mot_hf.data.tokenizer import train_tokenizer
from tests.damaging import ESCAPE, Damage, change, state, write
from tests.hostile import DENSE, REFUSED
from tests.hub import HubServer
from tests.models import tiny_config, trained
from tests.odd import GENERATION, LOGS, ODD, RECORDS
from tests.scripts.running import REPOSITORY

TEXTS = [f"def function_{i}(a, b):\n    return a * {i} + b\n" * 4 for i in range(40)]
COMMANDS = ("card", "push", "report", "calibrate", "export")
LONGEST = 10  # seconds of a processor for a command
LARGEST = 500 * 1024  # KiB of memory that a command may add
EVERY_COMMAND = "MOT_HF_EVERY_COMMAND" in os.environ


class LateError(BaseException):
    """A command does not end."""


class Outcome(NamedTuple):
    """How a command ended: with the status of its process, or an exception that nobody has explained."""

    status: int
    errors: list[str]
    fault: str | None


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MoT model of a finished run, a dense model, and a text."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    trained(MoTForCausalLM(tiny_config(vocab_size=300, num_hidden_layers=2))).save_pretrained(folder / "mot")
    state({"step": 8, "loss": 4.0, "learning_rate": 0.1}, {"step": 8, "eval_loss": 4.0})(folder / "mot")
    write("training.json", '{"text_name": "a text", "hyperparameters": {"seed": 1}}')(folder / "mot")
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    config = Qwen3Config(vocab_size=300, num_attention_heads=4, num_key_value_heads=2, **sizes)
    Qwen3ForCausalLM(config).save_pretrained(folder / "dense")
    for name in ("mot", "dense"):
        tokenizer.save_pretrained(folder / name)
    (folder / "text").mkdir()
    for index, text in enumerate(TEXTS):
        (folder / "text" / f"{index}.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    """A Hub for this process."""
    server = HubServer()
    with server.in_this_process():
        yield server
    server.close()


def arguments_of(command: str, folder: Path, models: Path) -> list[str]:
    output, text = folder.parent / f"{command}-output", ["--source", str(models / "text"), "--block-length", "8"]
    return {
        "card": ["card", str(folder), "--output", str(output)],
        "push": ["push", str(folder), "tester/small"],
        "report": ["report", str(folder), "--output", str(output), "--num-batches", "1", *text],
        "calibrate": ["calibrate", str(folder), "--output-dir", str(output), "--num-batches", "1", "--force", *text],
        "export": ["export", str(folder), str(output), "--force"],
        "upcycle": [
            *("upcycle", str(folder), str(output), "--group-size", "4", "--num-experts", "8", "--num-batches", "1"),
            *("--num-validation-batches", "1", *text),
        ],
    }[command]


def try_command(arguments: list[str]) -> Outcome:
    """Run a command in this process as the shell would."""

    def be_late(*_: object) -> None:
        raise LateError

    before, started, fault, status = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), None, 0
    signal.signal(signal.SIGALRM, be_late)
    signal.alarm(6 * LONGEST)
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as written,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sys, "argv", ["mot", *arguments])
        try:
            run()
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException as error:  # noqa: BLE001, whatever it is, it is the fault that is looked for
            fault = f"{type(error).__name__}: {error}"
        finally:
            signal.alarm(0)
    seconds, growth = time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if seconds > LONGEST:
        fault = f"{seconds:.0f} s, {fault}"
    if growth > LARGEST:
        fault = f"{growth / 1024:.0f} MiB, {fault}"
    errors = [line for line in written.getvalue().splitlines() if line.startswith("error: ")]
    if fault is None and (status, len(errors)) not in ((0, 0), (1, 1)):
        fault = f"status {status}, errors {errors}"
    return Outcome(status, errors, fault)


def try_all(
    damages: dict[str, Damage],
    source: Path,
    commands: tuple[str, ...],
    models: Path,
    tmp_path: Path,
    *,
    every_command: bool = EVERY_COMMAND,
) -> dict[tuple[str, str], Outcome]:
    outcomes = {}
    for index, (name, damage) in enumerate(damages.items()):
        folder = tmp_path / str(index) / "model"
        shutil.copytree(source, folder)
        damage(folder)
        for command in commands if every_command else (commands[index % len(commands)],):
            outcomes[name, command] = try_command(arguments_of(command, folder, models))
        shutil.rmtree(tmp_path / str(index))
    return outcomes


RUN_ALL = """
import sys
import tests.conftest
from mot_cli import run

for arguments in {commands!r}:
    sys.argv = ["mot", *arguments]
    try:
        run()
    except SystemExit as end:
        print("ended with", end.code)
"""


@pytest.mark.slow
def test_no_control_character_reaches_the_terminal(models: Path, tmp_path: Path) -> None:
    commands = []
    for index, damage in enumerate(
        (
            lambda folder: None,
            change("config.json", **{f"hidden_sizes{ESCAPE}": ESCAPE}),  # nearly a field, of which is warned
            change("config.json", architectures=[ESCAPE]),
            change("config.json", hidden_act=ESCAPE),
            change("tokenizer_config.json", tokenizer_class=ESCAPE, eos_token=ESCAPE),
            write("trainer_state.json", ESCAPE),
            write("training.json", json.dumps({ESCAPE: ESCAPE})),
            write("generation_config.json", json.dumps({"cache_implementation": ESCAPE, ESCAPE: ESCAPE})),
        )
    ):
        # Names of files hold no line ends in git, but may.
        for source, names in (("mot", ("card", "report", "calibrate", "export")), ("dense", ("upcycle",))):
            folder = tmp_path / f"{index}{ESCAPE}" / f"{source}{ESCAPE}"
            shutil.copytree(models / source, folder)
            if source == "mot" or index != 5:
                damage(folder)
            (folder.parent / f"{names[-1]}-output.unfinished-{ESCAPE}").mkdir()
            commands += [arguments_of(name, folder, models) for name in names]
    script = RUN_ALL.format(commands=commands)
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, check=True)
    assert done.stdout.count(b"ended with 0") > 10
    assert done.stdout.count(b"ended with 1") > 10
    assert b"owned" in done.stdout
    for written in (done.stdout, done.stderr):
        assert not re.findall(r"[^\S\n\r\t ]|[\x00-\x08\x0e-\x1f\x7f-\x9f]", written.decode())
    assert all(line.count(b"error:") < 2 for line in done.stderr.splitlines())


def faults_of(outcomes: dict[tuple[str, str], Outcome]) -> dict[tuple[str, str], str]:
    return {key: outcome.fault for key, outcome in outcomes.items() if outcome.fault is not None}


def test_a_good_folder_passes_all_commands(models: Path, hub: HubServer, tmp_path: Path) -> None:
    outcomes = try_all({"none": lambda folder: None}, models / "mot", COMMANDS, models, tmp_path, every_command=True)
    outcomes |= try_all({"none": lambda folder: None}, models / "dense", ("upcycle",), models, tmp_path)
    assert {key: outcome for key, outcome in outcomes.items() if outcome != Outcome(0, [], None)} == {}


@pytest.mark.slow
def test_what_is_no_model_is_refused(models: Path, hub: HubServer, tmp_path: Path) -> None:
    outcomes = try_all(REFUSED, models / "mot", COMMANDS, models, tmp_path)
    assert not faults_of(outcomes)
    assert not [key for key, outcome in outcomes.items() if outcome.status == 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damages", "commands"),
    [
        pytest.param(ODD, COMMANDS[1:], id="settings"),  # a push writes the card too
        pytest.param(GENERATION, ("push", "calibrate", "export"), id="generation"),
        pytest.param(LOGS, ("card", "report"), id="logs"),
        pytest.param(RECORDS, ("card", "push"), id="records"),
    ],
)
def test_what_is_odd_is_done_without_or_named(
    damages: dict[str, Damage], commands: tuple[str, ...], models: Path, hub: HubServer, tmp_path: Path
) -> None:
    assert not faults_of(try_all(damages, models / "mot", commands, models, tmp_path))


@pytest.mark.slow
def test_a_damaged_dense_model_is_refused_or_taken(models: Path, tmp_path: Path) -> None:
    assert not faults_of(try_all(DENSE | GENERATION, models / "dense", ("upcycle",), models, tmp_path))


def flip(seed: int) -> Damage:
    """Flip a bit, cut or double a part of a file that is drawn."""

    def damage(folder: Path) -> None:
        generator = random.Random(seed)
        path = generator.choice(sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")))
        content = bytearray(path.read_bytes())
        place = generator.randrange(min(len(content), generator.choice((200, 10**9))))
        kind = generator.choice(("flip", "cut", "double", "drop"))
        if kind == "flip":
            content[place] ^= 1 << generator.randrange(8)
        elif kind == "cut":
            del content[place:]
        elif kind == "double":
            content[place:place] = content[place : place + 50]
        else:
            del content[place : place + generator.randrange(1, 9)]
        path.write_bytes(content)

    return damage


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_accidents(seed: int, models: Path, hub: HubServer, tmp_path: Path) -> None:
    accidents = {f"accident {seed + index}": flip(seed + index) for index in range(25)}
    outcomes = try_all(accidents, models / "mot", COMMANDS, models, tmp_path)
    outcomes |= try_all(accidents, models / "dense", ("upcycle",), models, tmp_path)
    assert not faults_of(outcomes)
