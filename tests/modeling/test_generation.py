"""`generate()`: every way of decoding, caches, padding, and the mixing mode of a call."""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from mot_hf import MoTForCausalLM
from tests.models import EOS, MODES, PAD, random_ids, tiny_config, trained


@pytest.fixture
def model() -> MoTForCausalLM:
    torch.manual_seed(0)
    return trained(MoTForCausalLM(tiny_config()))


class Continuation(NamedTuple):
    """What follows the prompts, and the cache it was made with."""

    tokens: Tensor  # [B, 8]
    logits: Tensor  # [B, 8, vocab_size]
    cache: Any


def continue_greedily(model: MoTForCausalLM, input_ids: Tensor, **arguments: Any) -> Continuation:
    arguments = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False} | arguments
    output = model.generate(input_ids, output_logits=True, return_dict_in_generate=True, **arguments)
    tokens = output.sequences[:, input_ids.shape[1] :]
    return Continuation(tokens, torch.stack(output.logits, dim=1), output.past_key_values)


def assert_same(actual: Continuation, expected: Continuation) -> None:
    assert torch.equal(actual.tokens, expected.tokens)
    torch.testing.assert_close(actual.logits, expected.logits, atol=1e-5, rtol=1e-4)


def padded_on_the_left(rows: list[Tensor], num_columns: int) -> dict[str, Tensor]:
    """Input of `generate()` for rows of different lengths, with random ids where nobody should look."""
    ids = random_ids(len(rows), num_columns, seed=5)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, num_columns - len(row) :] = row
        mask[index, num_columns - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


@contextmanager
def recorded_modes(model: MoTForCausalLM) -> Iterator[set[str]]:
    """Modes that the last layer sees."""
    modes: set[str] = set()
    hook = model.model.layers[-1].mlp.register_forward_pre_hook(lambda _, args: modes.add(args[1].mode))
    yield modes
    hook.remove()


@pytest.mark.parametrize("mode", ["per_sequence", "moe"])
@torch.no_grad()
def test_greedy_decoding_is_repeated_forward_passes(model: MoTForCausalLM, mode: str) -> None:
    ids = random_ids(3, 5)
    expected = ids
    for _ in range(8):
        logits = model(expected, mixing=mode).logits[:, -1]
        logits[:, EOS] = -torch.inf
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    for use_cache in (True, False):
        actual = continue_greedily(model, ids, mixing=mode, use_cache=use_cache)
        assert torch.equal(actual.tokens, expected[:, 5:])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "arguments",
    [
        {"do_sample": True, "top_k": 20, "temperature": 1.5},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True},
    ],
    ids=str,
)
def test_every_strategy_yields_its_number_of_valid_tokens(
    model: MoTForCausalLM, arguments: dict[str, Any], mode: str
) -> None:
    ids = random_ids(2, 4)
    tokens = model.generate(ids, max_new_tokens=6, min_new_tokens=6, mixing=mode, **arguments)
    assert tokens.shape == (2 * arguments.get("num_return_sequences", 1), 10)
    assert torch.equal(tokens[:, :4], ids.repeat_interleave(arguments.get("num_return_sequences", 1), dim=0))
    assert ((tokens[:, 4:] >= 0) & (tokens[:, 4:] < 97)).all()


def test_sampling_depends_on_the_seed_alone(model: MoTForCausalLM) -> None:
    samples = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        samples.append(model.generate(random_ids(2, 4), max_new_tokens=8, do_sample=True))
    assert torch.equal(samples[0], samples[1])
    assert samples[0].tolist() != samples[2].tolist()


@torch.no_grad()
def test_more_beams_find_a_likelier_continuation(model: MoTForCausalLM) -> None:
    ids = random_ids(4, 5)

    def log_likelihood(num_beams: int) -> Tensor:
        new = model.generate(ids, max_new_tokens=8, min_new_tokens=8, num_beams=num_beams)[:, 5:]
        logits = model(torch.cat([ids, new], dim=1)).logits[:, 4:-1]
        return logits.log_softmax(-1).gather(-1, new[..., None]).sum((1, 2))

    assert (log_likelihood(4).mean() > log_likelihood(1).mean()).item()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padded", [False, True])
def test_static_and_dynamic_cache_agree(model: MoTForCausalLM, mode: str, padded: bool) -> None:
    # Three rows: in mode cross_example the group is short too.
    inputs = padded_on_the_left([random_ids(1, 5 - 2 * index * padded, seed=index)[0] for index in range(3)], 5)
    static, dynamic = (
        continue_greedily(model, **inputs, mixing=mode, cache_implementation=cache) for cache in ("static", "dynamic")
    )
    assert isinstance(static.cache, StaticCache)
    assert not isinstance(dynamic.cache, StaticCache)
    assert_same(static, dynamic)


@pytest.mark.parametrize("mode", ["per_sequence", "moe"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_padded_rows_go_on_as_they_do_alone(model: MoTForCausalLM, mode: str, cache: str) -> None:
    rows = [random_ids(1, length, seed=length)[0] for length in (6, 2, 4, 1, 5)]
    inputs = padded_on_the_left(rows, 6)
    together = continue_greedily(model, **inputs, mixing=mode, cache_implementation=cache)
    for index, row in enumerate(rows):
        alone = continue_greedily(model, row[None], mixing=mode, cache_implementation=cache)
        part = Continuation(together.tokens[index, None], together.logits[index, None], None)
        assert_same(part, alone)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_padding_changes_nothing_in_cross_example(model: MoTForCausalLM, cache: str) -> None:
    rows = [random_ids(1, 3, seed=seed)[0] for seed in range(5)]
    arguments = {"mixing": "cross_example", "cache_implementation": cache}
    plain = continue_greedily(model, torch.stack(rows), **arguments)
    padded = continue_greedily(model, **padded_on_the_left(rows, 7), **arguments)
    assert_same(padded, plain)
    one_column_less = continue_greedily(model, **padded_on_the_left([rows[0][1:], *rows[1:]], 7), **arguments)
    assert not torch.allclose(one_column_less.logits[1], plain.logits[1])


@torch.no_grad()
def test_cross_example_mixes_the_rows_of_every_step(model: MoTForCausalLM) -> None:
    ids = random_ids(4, 5)
    expected = ids
    for _ in range(8):
        logits = model(expected, mixing="cross_example").logits[:, -1]
        logits[:, EOS] = -torch.inf
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    actual = continue_greedily(model, ids, mixing="cross_example")
    assert torch.equal(actual.tokens, expected[:, 5:])
    alone = continue_greedily(model, ids[:1], mixing="cross_example")
    assert not torch.allclose(alone.logits[0, 0], actual.logits[0, 0])


def test_mixing_of_a_call_reaches_the_layers(model: MoTForCausalLM) -> None:
    ids = random_ids(2, 4)
    for mode in MODES:
        with recorded_modes(model) as modes:
            model.generate(ids, max_new_tokens=3, mixing=mode)
        assert modes == {mode}
    with recorded_modes(model) as modes:
        model.generate(ids, max_new_tokens=3)
    assert modes == {"per_sequence"}
    model.set_mixing(inference_mixing="moe")
    with recorded_modes(model) as modes:
        model.generate(ids, max_new_tokens=3)
    assert modes == {"moe"}
    assert not hasattr(model.generation_config, "mixing")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arguments", [{}, {"use_cache": False}, {"num_beams": 2}], ids=str)
def test_guidance_runs_in_the_mode_of_a_call(model: MoTForCausalLM, mode: str, arguments: dict[str, Any]) -> None:
    guided = {"max_new_tokens": 3, "min_new_tokens": 3, "guidance_scale": 1.5, **arguments}
    ids = random_ids(3, 5)
    with recorded_modes(model) as modes:
        tokens = model.generate(ids, mixing=mode, do_sample=False, **guided)
    assert modes == {mode}
    model.set_mixing(inference_mixing=mode)
    assert torch.equal(model.generate(ids, do_sample=False, **guided), tokens)


def test_a_callers_own_guidance_is_left_as_it_was(model: MoTForCausalLM) -> None:
    ids = random_ids(2, 5)
    for mode in ("moe", "per_sequence"):
        guidance = UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, model)
        with recorded_modes(model) as modes:
            model.generate(ids, mixing=mode, max_new_tokens=3, logits_processor=[guidance])
        assert modes == {mode}
        assert guidance.model is model


def test_a_generation_config_can_name_the_mode(model: MoTForCausalLM, tmp_path: Path) -> None:
    ids = random_ids(3, 5)

    def modes_of(*arguments: Any, **named: Any) -> set[str]:
        with recorded_modes(model) as modes:
            model.generate(ids, *arguments, **({"max_new_tokens": 2} | named))
        return modes

    config = GenerationConfig(max_new_tokens=2, mixing="moe", guidance_scale=1.5)
    assert modes_of(config) == modes_of(generation_config=config) == modes_of(config, num_beams=2) == {"moe"}
    assert modes_of(config, mixing="cross_example") == {"cross_example"}
    assert modes_of(config, mixing=None) == {"moe"}
    assert config.mixing == "moe"
    with pytest.raises(ValueError, match=r"`mixing` must be one of .* got 'both'"):
        modes_of(GenerationConfig(mixing="both"))
    assert modes_of() == {"per_sequence"}
    # The model's own comes after the call's.
    model.generation_config.mixing = "cross_example"
    assert modes_of() == {"cross_example"}
    assert modes_of(config) == modes_of(mixing="moe") == {"moe"}
    model.generation_config = GenerationConfig(mixing="cross_example")
    model.save_pretrained(tmp_path)
    model = MoTForCausalLM.from_pretrained(tmp_path)
    assert modes_of() == {"cross_example"}


def test_calls_from_several_threads_keep_their_modes(model: MoTForCausalLM) -> None:
    ids = random_ids(1, 5)
    calls = [{"mixing": mode} for mode in MODES]
    calls += [{"generation_config": GenerationConfig(mixing=mode)} for mode in MODES]

    def run(call: dict[str, Any]) -> Tensor:
        common = {"max_new_tokens": 6, "min_new_tokens": 6, "guidance_scale": 1.5, "do_sample": False}
        output = model.generate(ids, **common, **call, output_scores=True, return_dict_in_generate=True)
        return torch.stack(output.scores)

    expected = [run(call) for call in calls]
    assert not any(torch.allclose(expected[0], other) for other in expected[1:3])
    with ThreadPoolExecutor(6) as pool:
        torch.testing.assert_close(list(pool.map(run, calls)), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_chunked_prefill_changes_nothing(model: MoTForCausalLM, mode: str, padded: bool, cache: str) -> None:
    inputs = padded_on_the_left([random_ids(1, 7 - index * padded, seed=index)[0] for index in range(3)], 7)
    whole = continue_greedily(model, **inputs, mixing=mode)
    chunked = continue_greedily(model, **inputs, mixing=mode, prefill_chunk_size=3, cache_implementation=cache)
    assert_same(chunked, whole)


@pytest.mark.parametrize("mode", MODES)
def test_embeddings_can_be_the_prompt(model: MoTForCausalLM, mode: str) -> None:
    inputs = padded_on_the_left([random_ids(1, 5 - index)[0] for index in range(3)], 5)
    expected = continue_greedily(model, **inputs, mixing=mode)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    tokens = model.generate(
        inputs_embeds=embeddings,
        attention_mask=inputs["attention_mask"],
        mixing=mode,
        max_new_tokens=8,
        min_new_tokens=8,
    )
    assert torch.equal(tokens, expected.tokens)


@pytest.mark.parametrize("mode", MODES)
def test_generation_goes_on_from_a_cache(model: MoTForCausalLM, mode: str) -> None:
    inputs = padded_on_the_left([random_ids(1, 5 - index)[0] for index in range(3)], 5)
    expected = continue_greedily(model, **inputs, mixing=mode)
    start = continue_greedily(model, **inputs, mixing=mode, max_new_tokens=3, min_new_tokens=3)
    longer = torch.cat([inputs["input_ids"], start.tokens], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(start.tokens)], dim=1)
    rest = continue_greedily(
        model,
        longer,
        attention_mask=mask,
        mixing=mode,
        past_key_values=start.cache,
        max_new_tokens=5,
        min_new_tokens=5,
    )
    assert torch.equal(rest.tokens, expected.tokens[:, 3:])
    torch.testing.assert_close(rest.logits, expected.logits[:, 3:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["per_sequence", "moe"])
def test_assisted_decoding_changes_nothing(model: MoTForCausalLM, mode: str) -> None:
    ids = random_ids(1, 5)
    torch.manual_seed(1)
    strangers = trained(MoTForCausalLM(tiny_config(num_hidden_layers=2)))
    plain = continue_greedily(model, ids, mixing=mode)
    for assistant in (model, strangers):
        assisted = continue_greedily(model, ids, mixing=mode, assistant_model=assistant)
        assert_same(assisted, plain)


@pytest.mark.parametrize("mode", ["per_sequence", "moe"])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_an_early_exit_as_the_assistant_changes_nothing(model: MoTForCausalLM, num_layers: int, mode: str) -> None:
    ids = random_ids(1, 5)
    plain = continue_greedily(model, ids, mixing=mode)
    for _ in range(2):  # it leaves the model as it was
        assert_same(continue_greedily(model, ids, mixing=mode, assistant_early_exit=num_layers), plain)
    assert_same(continue_greedily(model, ids, mixing=mode), plain)


@pytest.mark.parametrize("mode", MODES)
def test_a_tokenizer_serves_stop_strings_alone(model: MoTForCausalLM, mode: str) -> None:
    words = {f"<{number}>": number for number in range(96)} | {"abcdef": 96}  # which stop strings are tried on
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "<0>")))
    ids = random_ids(1, 5)
    (expected,) = continue_greedily(model, ids, mixing=mode).tokens.tolist()
    with_tokenizer = continue_greedily(model, ids, mixing=mode, tokenizer=tokenizer).tokens
    assert with_tokenizer.tolist() == [expected]
    stop = expected[3]
    stopped = model.generate(ids, max_new_tokens=8, mixing=mode, tokenizer=tokenizer, stop_strings=f"<{stop}>")
    assert stopped[0, 5:].tolist() == expected[: expected.index(stop) + 1]


@pytest.mark.parametrize("mode", MODES)
def test_a_finished_row_is_filled_with_padding(model: MoTForCausalLM, mode: str) -> None:
    ids = random_ids(4, 5)
    free = continue_greedily(model, ids, mixing=mode).tokens
    ends = free[0, 2].item()
    tokens = model.generate(ids, max_new_tokens=8, mixing=mode, eos_token_id=ends)[:, 5:]
    first_end = free[0].tolist().index(ends)
    assert tokens[0, first_end] == ends
    assert (tokens[0, first_end + 1 :] == PAD).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_bfloat16_models_generate(model: MoTForCausalLM, mode: str, cache: str) -> None:
    low = model.to(torch.bfloat16)
    inputs = padded_on_the_left([random_ids(1, 5 - index)[0] for index in range(3)], 5)
    generated = continue_greedily(low, **inputs, mixing=mode, cache_implementation=cache)
    assert generated.logits.isfinite().all()
    assert generated.tokens.shape == (3, 8)


def rows_without(inputs: dict[str, Tensor], finished: Tensor, tokens: Tensor) -> Tensor:
    """What is mixed [B, T] in some greedy steps: neither padding nor, in finished rows, their end and what follows."""
    ended_before = (torch.isin(tokens, finished).cumsum(1) > 0).long()
    return torch.cat([inputs["attention_mask"], 1 - ended_before], dim=1)


@pytest.mark.parametrize("arguments", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
@torch.no_grad()
def test_finished_rows_are_not_mixed(model: MoTForCausalLM, arguments: dict[str, Any]) -> None:
    inputs = padded_on_the_left([random_ids(1, 5 - index, seed=index)[0] for index in range(4)], 5)
    free = continue_greedily(model, **inputs, mixing="cross_example")
    ends = free.tokens[2, 1, None]
    output = model.generate(
        **inputs,
        max_new_tokens=8,
        mixing="cross_example",
        do_sample=False,
        eos_token_id=ends.tolist(),
        output_logits=True,
        return_dict_in_generate=True,
        **arguments,
    )
    tokens, logits = output.sequences[:, 5:], torch.stack(output.logits, dim=1)
    has_ended = (tokens == ends).any(1)
    assert has_ended[2]
    assert not has_ended.all()
    token_mask = rows_without(inputs, ends, tokens)
    position_ids = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    position_ids = torch.cat([position_ids, position_ids[:, -1:] + torch.arange(1, tokens.shape[1] + 1)], dim=1)
    attention_mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], dim=1)
    expected = model(
        output.sequences,
        attention_mask=attention_mask,
        position_ids=position_ids,
        token_mask=token_mask,
        mixing="cross_example",
    ).logits[:, 4:-1]
    going_on = token_mask[:, 4:-1].bool()
    torch.testing.assert_close(logits[going_on], expected[going_on], atol=1e-5, rtol=1e-4)
    # The check has teeth: with the finished rows in the mixture the others' logits are different.
    mixed = continue_greedily(model, **inputs, mixing="cross_example").logits[:, : logits.shape[1]]
    assert not torch.allclose(logits[~has_ended], mixed[~has_ended], atol=1e-3)


def test_rows_end_by_any_criterion(model: MoTForCausalLM) -> None:
    class SecondRowAfterThreeTokens(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return torch.tensor([False, input_ids.shape[1] >= 8, False])

    masks = []
    model.model.register_forward_pre_hook(lambda _, args, kwargs: masks.append(kwargs["token_mask"]), with_kwargs=True)
    criteria = StoppingCriteriaList([SecondRowAfterThreeTokens()])
    arguments = {"max_new_tokens": 6, "min_new_tokens": 6, "mixing": "cross_example", "do_sample": True}
    model.generate(random_ids(3, 5), stopping_criteria=criteria, **arguments)
    rows_of_steps = [mask[:, -1].tolist() for mask in masks]
    assert rows_of_steps == [[True, True, True]] * 3 + [[True, False, True]] * 3


def test_generating_with_mixed_rows_warns_once(model: MoTForCausalLM, caplog: pytest.LogCaptureFixture) -> None:
    logging.Logger.warning_once.cache_clear()
    for mode in ("per_sequence", "moe"):
        model.generate(random_ids(2, 4), max_new_tokens=2, mixing=mode)
    model.generate(random_ids(1, 4), max_new_tokens=2, mixing="cross_example")
    assert "influence one another" not in caplog.text
    for arguments in ({}, {"num_beams": 2}, {"do_sample": True}):
        model.generate(random_ids(2, 4), max_new_tokens=2, mixing="cross_example", **arguments)
    assert caplog.text.count("influence one another") == 1
