"""Docstrings in Hugging Face's format, as the reference shows them."""

import pytest

griffe = pytest.importorskip("griffe")

from scripts.docs.docstrings import rewrite  # noqa: E402

OPTIONS = {"warnings": False, "returns_named_value": False}  # as in mkdocs.yml
DOCSTRING = """Does something with [`MoTConfig`] and [`Unknown`].

Args:
    config ([`MoTConfig`]): The configuration.
    tokens (`torch.Tensor` of shape `[B, T]`, *optional*): The tokens: all of them,
        and those of [`Unknown`].
    size (`int` or `list[int]`, *optional*, defaults to `max(1, 2)`):
        The size, in tokens (at least 1).
    args, kwargs: Passed on.

Returns:
    `dict[str, int]` or `None`: The sizes (by name).

Raises:
    ValueError: The size is wrong (`size (x): y`).

Example:

```python
>>> size (`int`): 5
```
"""


def test_types_and_defaults_are_read() -> None:
    docstring = griffe.Docstring(rewrite(DOCSTRING), parser="google", parser_options=OPTIONS)
    text, arguments, returned, raised, *_ = docstring.parsed
    assert text.value == "Does something with [`MoTConfig`][mot_hf.MoTConfig] and `Unknown`."
    assert [(each.name, str(each.annotation)) for each in arguments.value[:3]] == [
        ("config", "MoTConfig"),
        ("tokens", "torch.Tensor of shape [B, T]"),  # griffe leaves the word out
        ("size", "int or list[int], optional, defaults to max(1, 2)"),
    ]
    assert arguments.value[1].description == "The tokens: all of them,\nand those of `Unknown`."
    assert arguments.value[2].description.strip() == "The size, in tokens (at least 1)."
    assert str(returned.value[0].annotation) == "dict[str, int] or None"
    assert raised.value[0].description == "The size is wrong (`size (x): y`)."
    assert "(`int`): 5" in rewrite(DOCSTRING)


def test_defaults_of_functions_are_left_to_their_signatures() -> None:
    text = rewrite(DOCSTRING, keep_defaults=False)
    assert "tokens (torch.Tensor of shape [B, T]): The tokens" in text
    assert "size (int or list[int]):" in text
