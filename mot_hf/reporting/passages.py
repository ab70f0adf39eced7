"""The text around single tokens of a row, for the report page."""

from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup, escape
from transformers import PreTrainedTokenizerBase

# A character has at most this many bytes, and therefore at most this many tokens.
_CHARACTER = 4
_UNDECODABLE = "\N{REPLACEMENT CHARACTER}"
_VISIBLE = {" ": "\N{MIDDLE DOT}", "\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\t": "\N{RIGHTWARDS ARROW}"}


class Passage(NamedTuple):
    """A token and the text around it.

    Args:
        before (`str`): Text of the tokens before it.
        token (`str`): Text of the token itself, or the whole character if the token is only a part of one.
        after (`str`): Text of the tokens after it.
    """

    before: str
    token: str
    after: str


def find_passage(
    tokenizer: PreTrainedTokenizerBase, row: Sequence[int], column: int, num_before: int = 12, num_after: int = 6
) -> Passage:
    """Decodes a token of a row together with its neighbours.

    Args:
        tokenizer ([`PreTrainedTokenizerBase`]): The tokenizer.
        row (`Sequence[int]`): Token ids of the row.
        column (`int`): Position of the token in the row.
        num_before (`int`, *optional*, defaults to 12): Maximum number of tokens to show before it.
        num_after (`int`, *optional*, defaults to 6): Maximum number of tokens to show after it.

    Returns:
        [`Passage`]: The text, in three parts.
    """
    first, last = _whole_characters(tokenizer, row, column)
    start, stop = max(0, first - num_before), last + num_after
    # Cut one growing text by length: tokenizers may decode a token differently at the start of a text.
    before, upto, whole = (_decode(tokenizer, row[start:end]) for end in (first, last, stop))
    # Bytes that are not a complete character may add nothing to the text before them.
    token, after = upto[len(before) :] or _decode(tokenizer, row[first:last]), whole[len(upto) :]
    return Passage(before.lstrip(_UNDECODABLE), token, after.rstrip(_UNDECODABLE))


def _whole_characters(tokenizer: PreTrainedTokenizerBase, row: Sequence[int], column: int) -> tuple[int, int]:
    """The columns of the characters that a token is a part of; only its own column if these cannot be decoded."""
    for first in range(column, max(-1, column - _CHARACTER), -1):
        for last in range(column + 1, min(column + _CHARACTER, len(row)) + 1):
            if _UNDECODABLE not in _decode(tokenizer, row[first:last]):
                return first, last
    return column, column + 1


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def show_invisible(text: str) -> Markup:
    """Converts text to HTML in which whitespace and unprintable characters are visible.

    Args:
        text (`str`): Any text.

    Returns:
        `Markup`: The escaped text, with a symbol of class `invisible` for each character that has no visible shape.
        Lines may break after each symbol.
    """
    return Markup("").join(map(_show_character, text))


def _show_character(character: str) -> Markup:
    if character not in _VISIBLE and character.isprintable():
        return escape(character)
    sign = _VISIBLE.get(character) or character.encode("unicode_escape").decode()
    return Markup('<i class="invisible">{}</i><wbr>').format(sign)
