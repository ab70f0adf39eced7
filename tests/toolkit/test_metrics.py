"""Perplexity and bits per byte."""

import math

import pytest

from mot_hf.metrics import bits_per_byte, perplexity


def test_a_uniform_guess_has_the_perplexity_of_its_choices() -> None:
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(0.0) == 1
    assert perplexity(1e4) == math.inf


def test_guessing_bytes_uniformly_costs_eight_bits_each() -> None:
    assert bits_per_byte(math.log(256), num_tokens=10, num_bytes=10) == pytest.approx(8)
    assert bits_per_byte(math.log(256), num_tokens=10, num_bytes=40) == pytest.approx(2)


def test_no_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="num_bytes=0"):
        bits_per_byte(1.0, num_tokens=1, num_bytes=0)
