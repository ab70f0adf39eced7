"""Command lines of pages, parsed by the parsers of the commands themselves, which then do nothing."""

import importlib
import re
import runpy
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, chdir, redirect_stderr, redirect_stdout
from functools import wraps
from importlib.util import find_spec
from io import StringIO
from typing import Any
from unittest.mock import patch

from transformers import HfArgumentParser

import mot_hf.training
from mot_cli import app
from tests.scripts.running import REPOSITORY

# Programs of others, whose lines are taken as they are.
FOREIGN = {"cd", "curl", "export", "git", "hf", "kill", "lm_eval", "ls", "mkdir", "nvidia-smi", "sbatch"}
FOREIGN |= {"llama-cli", "llama-server", "tensorboard", "transformers", "vllm", "wc", "cat", "cp", "tar"}
KNOWN = {"mot", "python", "python3", "make", "pip", "accelerate", "torchrun", ".ci/run", "pre-commit"}
_ASSIGNMENT = re.compile(r"^\w+=")
_PLACEHOLDERS = {"DIR", "..."}  # for words of the reader's
_SEPARATORS = {"|", "&&", "||", ";", "&"}


class ParsedError(BaseException):
    """The arguments were parsed; nothing else shall be done."""


def split_lines(text: str) -> Iterator[list[str]]:
    """The commands of a block, each as its words, without comments, assignments and redirections."""
    for line in text.replace("\\\n", " ").split("\n"):
        words = shlex.split(line.removeprefix("$ "), comments=True)
        command: list[str] = []
        for word in [*words, ";"]:
            if word in _SEPARATORS:
                if command := _without_extras(command):
                    yield command
                command = []
            else:
                command.append(word)


def is_commands(text: str) -> bool:
    """Whether indented code is command lines: its first line begins with a command that is known."""
    first = next(iter(text.split("\n")), "")
    try:
        words = next(split_lines(first), [])
    except ValueError:
        return False
    return bool(words) and name_of(words) in KNOWN | {"lm_eval", "hf"}


def name_of(words: Sequence[str]) -> str:
    """The program of a command, without the folder of an environment."""
    return words[0] if words[0] == ".ci/run" else words[0].rpartition("/")[2]


def parse(words: Sequence[str]) -> None:
    """Parses a command.

    Raises:
        ValueError: It is not one that its program takes.
    """
    name, rest = name_of(words), list(words[1:])
    parsers = {"mot": _parse_mot, "make": _parse_make, "pip": _parse_pip}
    if name in parsers:
        parsers[name](rest)
    elif name in ("python", "python3"):
        if not words[0].startswith(".venv-vllm/"):  # another environment
            _parse_python(rest)
    elif name == "accelerate":
        _parse_accelerate(rest)
    elif name == "torchrun":
        from torch.distributed.run import get_args_parser

        arguments = _quietly(lambda: get_args_parser().parse_args(rest))
        _parse_python([arguments.training_script, *arguments.training_script_args])
    elif name == ".ci/run":
        assert not rest
    elif name not in FOREIGN | {"pre-commit"}:
        raise ValueError(f"{name!r} is not a program that tests/docs/commands.py knows")


def _parse_mot(words: list[str]) -> None:
    words = [word for word in words if word != "--quiet"]
    if "--help" in words:
        names = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
        if words != ["--help"] and words[0] not in names:
            raise ValueError(f"mot has no command {words[0]!r}")
        return
    with _stopping_after_arguments():
        try:
            _quietly(lambda: app(words, standalone_mode=False))
        except ParsedError:
            return
        except SystemExit as end:
            raise ValueError(f"ends with {end.code}") from None
    raise ValueError("was carried out")


def _parse_make(words: list[str]) -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    variables = set(re.findall(r"^(\w+) [?:]?=", makefile, re.MULTILINE)) | {"WHEELS"}
    for word in words:
        name = word.partition("=")[0]
        if name not in (variables if _ASSIGNMENT.match(word) else targets):
            raise ValueError(f"make has no {name!r}")


def _parse_pip(words: list[str]) -> None:
    with patch("setuptools.setup"):
        extras = runpy.run_path(str(REPOSITORY / "setup.py"))["EXTRAS"]
    for word in words:
        if found := re.fullmatch(r"(?:\.|mot_hf)(?:\[([\w,]+)\])?", word):
            unknown = set((found[1] or "").split(",")) - set(extras) - {""}
            if unknown:
                raise ValueError(f"setup.py has no extra {unknown}")


def _parse_python(words: list[str]) -> None:
    if words[:1] == ["-c"]:
        compile(words[1], "-c", "exec")
        return
    if words[:1] == ["-m"]:
        module, arguments = words[1], words[2:]
        if module.partition(".")[0] != "scripts" and module != "mot_cli":
            if find_spec(module.partition(".")[0]) is None:
                raise ValueError(f"there is no module {module}")
            return
        if module == "mot_cli":
            _parse_mot(arguments)
            return
        path = REPOSITORY / (module.replace(".", "/") + ".py")
    else:
        path, arguments = REPOSITORY / words[0], words[1:]
    if not path.is_file():
        raise ValueError(f"there is no {path}")
    if _PLACEHOLDERS & set(arguments):
        return
    with _stopping_after_arguments(), patch.object(sys, "argv", [str(path), *arguments]):
        try:
            _quietly(lambda: runpy.run_path(str(path), run_name="__main__"))
        except ParsedError:
            return
    raise ValueError("was carried out")


def _parse_accelerate(words: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    if words[:1] != ["launch"]:
        return
    arguments = _quietly(lambda: launch_command_parser().parse_args(words[1:]))
    if arguments.config_file is not None and not (REPOSITORY / arguments.config_file).is_file():
        raise ValueError(f"there is no {arguments.config_file}")
    script = ["-m", arguments.training_script] if arguments.module else [arguments.training_script]
    _parse_python([*script, *arguments.training_script_args])


def _stopping_after_arguments() -> ExitStack:
    """Let every command end as soon as its arguments are parsed."""
    parse_all, parse_dataclasses = mot_hf.training.parse_arguments, HfArgumentParser.parse_args_into_dataclasses

    def parse_arguments(*args: Any, **kwargs: Any) -> None:
        parse_all(*args, **kwargs)
        raise ParsedError

    def parse_args_into_dataclasses(self: HfArgumentParser, *args: Any, **kwargs: Any) -> Any:
        parsed = parse_dataclasses(self, *args, **kwargs)
        if kwargs.get("return_remaining_strings"):
            return parsed
        raise ParsedError

    stack = ExitStack()
    stack.enter_context(chdir(REPOSITORY))
    # Commands for a GPU are for another machine.
    stack.enter_context(patch("transformers.training_args.is_torch_bf16_gpu_available", lambda: True))
    stack.enter_context(patch.object(mot_hf.training, "parse_arguments", parse_arguments))
    stack.enter_context(patch.object(HfArgumentParser, "parse_args_into_dataclasses", parse_args_into_dataclasses))
    # `mot serve` hands its arguments on to this group.
    serve = importlib.import_module("transformers.cli.transformers").app.commands["serve"]
    stack.enter_context(patch.object(serve, "callback", _doing_nothing(serve.callback)))
    for command in app.registered_commands:
        if not (command.context_settings or {}).get("allow_extra_args"):
            stack.enter_context(patch.object(command, "callback", _doing_nothing(command.callback)))
    return stack


def _doing_nothing(callback: Any) -> Any:
    @wraps(callback)
    def invoke(*args: Any, **kwargs: Any) -> None:
        raise ParsedError

    return invoke


def _quietly(work: Any) -> Any:
    """Do something without its output; what it says goes into the error if it ends the process."""
    said = StringIO()
    with redirect_stderr(said), redirect_stdout(said):
        try:
            return work()
        except SystemExit as end:
            if end.code:
                raise ValueError(said.getvalue().strip().splitlines()[-1] if said.getvalue() else end.code) from None
            return None


def _without_extras(words: Sequence[str]) -> list[str]:
    """A command without assignments before it and files that it writes to or reads from."""
    words = list(words)
    while words and _ASSIGNMENT.match(words[0]):
        del words[0]
    for sign in (">", ">>", "<", "2>"):
        while sign in words:
            place = words.index(sign)
            del words[place : place + 2]
    return words
