"""Text around single tokens of a row, for a page."""

from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup, escape
from transformers import PreTrainedTokenizerBase

# A character has at most this many bytes, and so tokens.
_CHARACTER = 4
_UNDECODABLE = "\N{REPLACEMENT CHARACTER}"
_VISIBLE = {" ": "\N{MIDDLE DOT}", "\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\t": "\N{RIGHTWARDS ARROW}"}


class Passage(NamedTuple):
    """A token and the text beside it.

    Args:
        before (`str`): Text of the tokens before it.
        token (`str`): Text of the token itself; of the whole character if the token is only a part of one.
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
        column (`int`): Place of the token in the row.
        num_before (`int`, *optional*, defaults to 12): Number of tokens to show before it, where there are as many.
        num_after (`int`, *optional*, defaults to 6): Number of tokens to show after it, where there are as many.

    Returns:
        [`Passage`]: The text, in three parts.
    """
    first, last = _whole_characters(tokenizer, row, column)
    start, stop = max(0, first - num_before), last + num_after
    # As lengths of one text that grows: tokenizers may decode a token differently where it comes first.
    before, upto, whole = (_decode(tokenizer, row[start:end]) for end in (first, last, stop))
    # Bytes that make no character may add nothing to those before them.
    token, after = upto[len(before) :] or _decode(tokenizer, row[first:last]), whole[len(upto) :]
    return Passage(before.lstrip(_UNDECODABLE), token, after.rstrip(_UNDECODABLE))


def _whole_characters(tokenizer: PreTrainedTokenizerBase, row: Sequence[int], column: int) -> tuple[int, int]:
    """The columns of the characters that a token is a part of; its own column where that is nothing to decode."""
    for first in range(column, max(-1, column - _CHARACTER), -1):
        for last in range(column + 1, min(column + _CHARACTER, len(row)) + 1):
            if _UNDECODABLE not in _decode(tokenizer, row[first:last]):
                return first, last
    return column, column + 1


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def show_invisible(text: str) -> Markup:
    """Makes text HTML in which whitespace and what cannot be printed are to be seen.

    Args:
        text (`str`): Any text.

    Returns:
        `Markup`: The text, escaped, with a sign of class `invisible` for every character without a shape of its own;
        lines may break after it.
    """
    return Markup("").join(map(_show_character, text))


def _show_character(character: str) -> Markup:
    if character not in _VISIBLE and character.isprintable():
        return escape(character)
    sign = _VISIBLE.get(character) or character.encode("unicode_escape").decode()
    return Markup('<i class="invisible">{}</i><wbr>').format(sign)
