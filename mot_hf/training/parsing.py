"""Reads the arguments of a command from its command line and from a recipe."""

import json
import logging
import sys
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter, ArgumentTypeError
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher, get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments

from mot_hf.training.arguments import GivenArguments

logger = logging.getLogger(__name__)

RECIPES = Path(__file__).parents[1] / "recipes"
_RECIPE_ENDINGS = (".yaml", ".yml")
_RUNS = "runs"
_AS_NEAR = 0.01


class _ShortHelp(ArgumentDefaultsHelpFormatter):
    """Help without the second spelling of each name and without defaults that say nothing."""

    def _format_action_invocation(self, action: Action) -> str:
        names, action.option_strings = action.option_strings, action.option_strings[:1]
        try:
            return super()._format_action_invocation(action)
        finally:
            action.option_strings = names

    def _get_help_string(self, action: Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class RecipeParser(HfArgumentParser):
    """A parser of `[RECIPE] [--name value ...]` whose errors are `ValueError`s, with the nearest name.

    Args:
        dataclasses (`Sequence[type]`): Dataclasses of the arguments. Each has a section of its own in the help.
        settings: Arguments of `argparse.ArgumentParser`.
    """

    def __init__(self, dataclasses: Sequence[type], **settings: Any) -> None:
        usage = "%(prog)s [RECIPE] [--name value ...]"
        super().__init__(dataclasses, usage=usage, allow_abbrev=False, formatter_class=_ShortHelp, **settings)
        objects = {name for each in dataclasses for name in getattr(each, "_VALID_DICT_FIELDS", ())}
        for action in self._actions:
            if action.dest in objects:  # transformers reads them later, and names no argument then
                action.type = partial(_check_object, may_be_file=not action.dest.endswith("_kwargs"))

    def _add_dataclass_arguments(self, dtype: Any) -> None:
        title = getattr(dtype, "_argument_group_name", f"arguments of {dtype.__name__}")
        super()._add_dataclass_arguments(type(dtype.__name__, (dtype,), {"_argument_group_name": title}))

    def error(self, message: str) -> NoReturn:
        """Raise a `ValueError` in place of the usage and the end of the process."""
        raise ValueError(f"{message.rstrip('.')}. See `--help`.")

    def set_recipe(self, recipe: dict[str, Any]) -> None:
        """Take the values of a recipe as defaults.

        Args:
            recipe (`dict[str, Any]`): Values by the names of arguments.

        Raises:
            ValueError: A value has another type than its argument.
        """
        for action in self._actions:
            if action.dest in recipe:
                action.default = _convert(action, recipe[action.dest])
                action.required = False

    def names(self) -> set[str]:
        """The names of all arguments."""
        return {action.dest for action in self._actions} - {"help"}


def parse_arguments(
    dataclasses: Sequence[type], argv: Sequence[str] | None = None, **settings: Any
) -> tuple[Any, ...]:
    """Parses `[RECIPE] [--name value ...]`; the command line takes precedence over the recipe.

    Without `output_dir`, the output goes to a folder in `runs` that has the name of the recipe.

    Args:
        dataclasses (`Sequence[type]`): Dataclasses of the arguments. No two may share a field name.
        argv (`Sequence[str]`, *optional*): Arguments; by default, those of the process. A recipe comes first: the path
            of a YAML file, or the name of one that the package contains, such as `small_clm`.
        settings: Arguments of `argparse.ArgumentParser`, such as `prog` and `description`.

    Returns:
        `tuple`: One instance per dataclass.

    Raises:
        ValueError: An argument is unknown or has a wrong value, or the recipe is not a mapping or has an unknown
            argument. The message gives the nearest name.
        OSError: The recipe cannot be read.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser, recipe, name = RecipeParser(dataclasses, **settings), {}, "run"
    if arguments and not arguments[0].startswith("-"):
        path = find_recipe(arguments.pop(0))
        recipe, name = _read_recipe(path, parser.names()), path.stem
        parser.set_recipe(recipe)
    is_run = any(issubclass(each, TrainingArguments) for each in dataclasses)
    if is_run and "output_dir" not in recipe:
        parser.set_defaults(output_dir=f"{_RUNS}/{name}")
    *parsed, unknown = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        _refuse(unknown, parser.names())
    given = _names_given(dataclasses, arguments)
    if is_run and "output_dir" not in {*recipe, *given}:
        logger.warning("`output_dir` is not given: everything is written to %s/%s.", _RUNS, name)
    for each in parsed:
        if isinstance(each, GivenArguments):
            each.from_recipe = frozenset(recipe) - given
    return tuple(parsed)


def _check_object(text: str, may_be_file: bool) -> str:
    """A text in which transformers will read an object, or the name of a file with one."""
    if may_be_file and not text.startswith("{"):
        return text
    try:
        is_object = isinstance(json.loads(text), dict)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not is_object:
        raise ArgumentTypeError(f"{text!r} must be an object, such as '{{\"name\": 1}}'")
    return text


def _convert(action: Action, value: Any) -> Any:
    """A value of a recipe as its argument's type has it; the parser itself converts texts, and lists stay."""
    if action.nargs not in (None, "?"):
        return value
    if action.choices is not None and value is not None and value not in action.choices:
        raise ValueError(f"`{action.dest}: {value}` must be one of {', '.join(map(str, action.choices))}.")
    if action.type is str and isinstance(value, bool):
        return str(value).lower()  # as on a command line
    if action.type not in (int, float) or isinstance(value, str):
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and action.type(value) == value:
        return action.type(value)
    if value is None and action.default is None:
        return None
    kind = "an integer" if action.type is int else "a number"
    raise ValueError(f"`{action.dest}: {'null' if value is None else value}` must be {kind}.")


def list_recipes() -> dict[str, Path]:
    """Lists the recipes that the package contains.

    Returns:
        `dict[str, Path]`: Their files by their names, such as `small_clm` or `finetune/tokens`.
    """
    paths = sorted(RECIPES.rglob("*.yaml"))
    return {path.relative_to(RECIPES).with_suffix("").as_posix(): path for path in paths}


def find_recipe(name: str) -> Path:
    """Finds a recipe by its path, or by its name among those that the package contains.

    Args:
        name (`str`): Path of a YAML file, or a name of [`list_recipes`].

    Returns:
        `Path`: The file.

    Raises:
        OSError: There is no such recipe. The message gives the nearest name, or all names.
    """
    if name.endswith(_RECIPE_ENDINGS) and Path(name).is_file():
        return Path(name)
    recipes = list_recipes()
    if name.removesuffix(".yaml") in recipes:
        return recipes[name.removesuffix(".yaml")]
    advice = _suggest(name, recipes) or f": give a YAML file, or one of {', '.join(recipes)}"
    raise FileNotFoundError(f"There is no recipe {name!r}{advice}.")


def _read_recipe(path: Path, known: set[str]) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(
            f"Recipe {str(path)!r}{where} is not YAML: {getattr(error, 'problem', None) or error}."
        ) from None
    if not isinstance(recipe, dict):
        raise ValueError(f"Recipe {str(path)!r} must be a mapping of argument names to values.")
    if unknown := sorted(map(str, set(recipe) - known)):
        names = ", ".join(name + _suggest(name, known) for name in unknown)
        raise ValueError(f"Recipe {str(path)!r} has unknown arguments: {names}. See `--help`.")
    return recipe


def _refuse(unknown: Sequence[str], known: set[str]) -> NoReturn:
    """Say what is wrong with arguments that the parser does not know."""
    name = unknown[0].removeprefix("--").partition("=")[0]
    if unknown[0].startswith("--"):
        nearest = _suggest(name.replace("-", "_"), known, prefix="--")
        raise ValueError(f"There is no argument `--{name}`{nearest}. See `--help`.")
    if unknown[0].endswith(_RECIPE_ENDINGS) or unknown[0] in list_recipes():
        raise ValueError(f"The recipe {unknown[0]!r} must come first, and there can be only one.")
    raise ValueError(f"{unknown[0]!r} belongs to no argument: write `--name value`. See `--help`.")


def _suggest(name: str, known: Iterable[str], prefix: str = "") -> str:
    nearest = get_close_matches(name, sorted(known), n=2, cutoff=0.7)
    # A second one only where it is as near: `small_cml` may be `small_clm` or `small_mlm`.
    ratios = [SequenceMatcher(None, each, name).ratio() for each in nearest]
    near = [each for each, ratio in zip(nearest, ratios, strict=True) if ratio > ratios[0] - _AS_NEAR]
    return f" (did you mean {' or '.join(f'`{prefix}{each}`' for each in near)}?)" if near else ""


def _names_given(dataclasses: Sequence[type], arguments: Sequence[str]) -> set[str]:
    """The names of the arguments that a command line sets, even if to their defaults."""
    parser = RecipeParser(dataclasses)
    for action in parser._actions:
        action.default, action.required = SUPPRESS, False
    return set(vars(parser.parse_known_args(arguments)[0]))
