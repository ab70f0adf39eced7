"""What is served to a prompt: however it is generated, the continuation that it gets alone."""

import copy
import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import Tokenizer as TokenizerBackend
from tokenizers import models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
    pipeline,
)
from transformers.generation.continuous_batching.requests import GenerationOutput

from mot_hf import MoTForCausalLM
from tests.compiling import fresh_compiler
from tests.models import EOS, PAD, random_ids, tiny_config, trained

INDEPENDENT_MODES = ["per_sequence", "moe"]
NUM_NEW_TOKENS = 8


@pytest.fixture(scope="module")
def served() -> MoTForCausalLM:
    torch.manual_seed(0)
    return trained(MoTForCausalLM(tiny_config()))


@pytest.fixture
def model(served: MoTForCausalLM) -> MoTForCausalLM:
    return copy.deepcopy(served)


@pytest.fixture
def prompts() -> list[Tensor]:
    return [random_ids(1, length, seed=length)[0] for length in (6, 2, 9, 1, 4)]


class Continuation(NamedTuple):
    """What follows one prompt, to its end."""

    tokens: list[int]
    logits: Tensor  # [number of tokens, vocab_size]


def generate(model: MoTForCausalLM, input_ids: Tensor, **arguments: Any) -> list[Continuation]:
    """Greedy continuations of all rows, each followed by padding alone."""
    ends = arguments.get("eos_token_id", [EOS])
    arguments = {"max_new_tokens": NUM_NEW_TOKENS, "do_sample": False} | arguments
    output = model.generate(input_ids, output_logits=True, return_dict_in_generate=True, **arguments)
    continuations = []
    for new, logits in zip(output.sequences[:, input_ids.shape[1] :], torch.stack(output.logits, dim=1), strict=True):
        tokens = to_the_end(new, ends)
        assert (new[len(tokens) :] == PAD).all()
        continuations.append(Continuation(tokens, logits[: len(tokens)]))
    return continuations


def to_the_end(tokens: Tensor, ends: list[int]) -> list[int]:
    is_end = torch.isin(tokens, torch.tensor(ends))
    return tokens[: int(is_end.int().argmax()) + 1 if is_end.any() else len(tokens)].tolist()


def assert_same(actual: list[Continuation], expected: list[Continuation]) -> None:
    assert [one.tokens for one in actual] == [one.tokens for one in expected]
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.logits, other.logits, atol=1e-5, rtol=1e-5)


def alone(model: MoTForCausalLM, prompts: list[Tensor], **arguments: Any) -> list[Continuation]:
    """What every prompt gets in a batch of its own, with a dynamic cache."""
    return [generate(model, prompt[None], **arguments)[0] for prompt in prompts]


def padded_on_the_left(prompts: list[Tensor]) -> dict[str, Tensor]:
    """One batch of all prompts, with random ids where nobody should look."""
    num_columns = max(len(prompt) for prompt in prompts)
    columns = torch.arange(num_columns)
    mask = torch.stack([columns >= num_columns - len(prompt) for prompt in prompts])
    ids = random_ids(len(prompts), num_columns, seed=5)
    ids[mask] = torch.cat(prompts)
    return {"input_ids": ids, "attention_mask": mask.long()}


def early_ends(model: MoTForCausalLM, prompts: list[Tensor], mode: str) -> list[int]:
    """Tokens that, as ends of a sequence, stop the second and the last of the prompts early."""
    free = alone(model, prompts, mixing=mode)
    return [free[1].tokens[1], free[-1].tokens[3]]


@contextmanager
def counted_calls(module: nn.Module) -> Iterator[list[None]]:
    """One entry for every forward pass of a module."""
    calls: list[None] = []
    hook = module.register_forward_pre_hook(lambda *_: calls.append(None))
    yield calls
    hook.remove()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("mode", INDEPENDENT_MODES)
def test_rows_that_finish_early_change_nothing_for_the_others(
    model: MoTForCausalLM, prompts: list[Tensor], mode: str, cache: str
) -> None:
    arguments = {"mixing": mode, "eos_token_id": early_ends(model, prompts, mode)}
    expected = alone(model, prompts, **arguments)
    assert len({len(one.tokens) for one in expected}) >= 3
    together = generate(model, **padded_on_the_left(prompts), **arguments, cache_implementation=cache)
    assert_same(together, expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("mode", INDEPENDENT_MODES)
def test_the_beams_of_a_prompt_are_those_it_has_alone(
    model: MoTForCausalLM, prompts: list[Tensor], mode: str, cache: str
) -> None:
    ends = early_ends(model, prompts, mode)
    arguments = {"num_beams": 3, "num_return_sequences": 3, "output_scores": True, "return_dict_in_generate": True}
    arguments |= {"mixing": mode, "eos_token_id": ends, "max_new_tokens": NUM_NEW_TOKENS, "do_sample": False}

    def beams(output: Any, num_columns: int) -> list[list[int]]:
        return [to_the_end(new, ends) for new in output.sequences[:, num_columns:]]

    inputs = padded_on_the_left(prompts)
    together = model.generate(**inputs, **arguments, cache_implementation=cache)
    separate = [model.generate(prompt[None], **arguments) for prompt in prompts]
    expected = [beam for prompt, one in zip(prompts, separate, strict=True) for beam in beams(one, len(prompt))]
    assert len({len(beam) for beam in expected}) >= 3
    assert beams(together, inputs["input_ids"].shape[1]) == expected
    scores = torch.cat([one.sequences_scores for one in separate])
    torch.testing.assert_close(together.sequences_scores, scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("mode", INDEPENDENT_MODES)
def test_looking_tokens_up_in_the_prompt_changes_nothing(model: MoTForCausalLM, mode: str, num_tokens: int) -> None:
    start = random_ids(1, 4)
    # A prompt that holds its own continuation, so that some of what is looked up is right.
    future = torch.tensor([generate(model, start, mixing=mode, max_new_tokens=12)[0].tokens])
    prompt = torch.cat([start, future, start], dim=1)
    expected = generate(model, prompt, mixing=mode, max_new_tokens=16)
    with counted_calls(model) as calls:
        looked_up = generate(
            model,
            prompt,
            mixing=mode,
            max_new_tokens=16,
            prompt_lookup_num_tokens=num_tokens,
            max_matching_ngram_size=1,
        )
    assert_same(looked_up, expected)
    assert len(calls) < len(expected[0].tokens)


def dense_assistant() -> Qwen3ForCausalLM:
    fields = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    fields |= {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": PAD, "eos_token_id": EOS}
    return Qwen3ForCausalLM(Qwen3Config(**fields)).eval()


@pytest.mark.parametrize("assistant", ["itself", "of_other_mixing", "dense"])
@pytest.mark.parametrize("mode", INDEPENDENT_MODES)
def test_assistants_change_nothing(model: MoTForCausalLM, prompts: list[Tensor], mode: str, assistant: str) -> None:
    if assistant == "dense":
        helper = dense_assistant()
    else:
        helper = copy.deepcopy(model)
        helper.set_mixing(inference_mixing="cross_example" if assistant == "of_other_mixing" else mode)
    model.set_mixing(inference_mixing=mode)
    ends = early_ends(model, prompts, mode)
    expected = alone(model, prompts, eos_token_id=ends)
    with counted_calls(model) as calls:
        assisted = alone(model, prompts, eos_token_id=ends, assistant_model=helper)
    assert_same(assisted, expected)
    if assistant == "itself":
        assert len(calls) < sum(len(one.tokens) for one in expected)


@pytest.mark.parametrize("mode", INDEPENDENT_MODES)
@torch.no_grad()
def test_prompts_can_share_the_cache_of_their_prefix(model: MoTForCausalLM, mode: str) -> None:
    prefix = random_ids(1, 7, seed=70)
    cache = DynamicCache(config=model.config)
    model(prefix, past_key_values=cache, mixing=mode)
    for length in (1, 5, 2):
        prompt = torch.cat([prefix, random_ids(1, length, seed=length)], dim=1)
        actual = generate(model, prompt, mixing=mode, past_key_values=copy.deepcopy(cache))
        assert_same(actual, generate(model, prompt, mixing=mode))
    assert cache.get_seq_length() == 7


@pytest.mark.parametrize("mode", INDEPENDENT_MODES)
@torch.no_grad()
def test_a_batch_can_share_the_cache_of_its_prefix(model: MoTForCausalLM, mode: str) -> None:
    prefix = random_ids(1, 7, seed=70)
    cache = DynamicCache(config=model.config)
    model(prefix, past_key_values=cache, mixing=mode)
    cache.batch_repeat_interleave(3)
    together = torch.cat([prefix.expand(3, -1), random_ids(3, 4)], dim=1)
    assert_same(
        generate(model, together, mixing=mode, past_key_values=cache), alone(model, list(together), mixing=mode)
    )


def few_small_pages() -> ContinuousBatchingConfig:
    """Memory so short that requests wait, are prefilled in parts, and can share the pages of a common prefix."""
    fields = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    sizes = {"page_size" if "page_size" in fields else "block_size": 4}
    return ContinuousBatchingConfig(num_blocks=24, max_batch_tokens=12, **sizes)


def batch_continuously(model: MoTForCausalLM, prompts: list[Tensor], **arguments: Any) -> list[GenerationOutput]:
    """What transformers' continuous batching makes of requests that arrive together."""
    config = GenerationConfig(max_new_tokens=NUM_NEW_TOKENS, do_sample=False, eos_token_id=EOS, pad_token_id=PAD)
    results = model.generate_batch(
        [prompt.tolist() for prompt in prompts],
        generation_config=config,
        continuous_batching_config=few_small_pages(),
        **arguments,
    )
    return list(results.values())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", INDEPENDENT_MODES)
def test_continuously_batched_requests_get_what_they_get_alone(
    model: MoTForCausalLM, prompts: list[Tensor], mode: str, attention: str
) -> None:
    model.set_attn_implementation(attention)
    model.set_mixing(inference_mixing=mode)
    requests = [*prompts, prompts[0], torch.cat([prompts[2], prompts[1]]), *prompts]
    expected = [one.tokens for one in alone(model, requests)]
    with counted_calls(model) as calls:
        results = batch_continuously(model, requests)
    assert [result.generated_tokens for result in results] == expected
    assert len(calls) < sum(len(tokens) for tokens in expected)


def continue_in_pages(model: MoTForCausalLM, prompt: Tensor, entrance: str, mode: str | None) -> list[int]:
    """New tokens of one request by continuous batching."""
    if entrance == "generate_batch":
        return batch_continuously(model, [prompt], mixing=mode)[0].generated_tokens
    arguments = {"max_new_tokens": NUM_NEW_TOKENS, "do_sample": False, "cache_implementation": "paged"}
    arguments["continuous_batching_config"] = few_small_pages()
    return model.generate(prompt[None], mixing=mode, **arguments)[0, 0, len(prompt) :].tolist()


@pytest.mark.parametrize("entrance", ["generate_batch", "generate"])
def test_continuous_batching_obeys_the_mode_of_a_call(
    model: MoTForCausalLM, prompts: list[Tensor], entrance: str
) -> None:
    prompt = prompts[2]
    in_moe, in_default = (generate(model, prompt[None], mixing=name)[0].tokens for name in ("moe", None))
    assert in_moe != in_default
    assert continue_in_pages(model, prompt, entrance, "moe") == in_moe
    assert continue_in_pages(model, prompt, entrance, None) == in_default
    assert model.config.inference_mixing == "per_sequence"


@pytest.mark.parametrize("entrance", ["generate_batch", "generate"])
def test_continuous_batching_obeys_the_mode_of_a_generation_config(
    model: MoTForCausalLM, prompts: list[Tensor], entrance: str
) -> None:
    prompt = prompts[2]
    in_moe = generate(model, prompt[None], mixing="moe")[0].tokens

    def run(mode: str | None) -> list[int]:
        config = GenerationConfig(max_new_tokens=NUM_NEW_TOKENS, do_sample=False, eos_token_id=EOS, pad_token_id=PAD)
        config.mixing = mode
        arguments: dict[str, Any] = {"generation_config": config, "continuous_batching_config": few_small_pages()}
        if entrance == "generate_batch":
            return next(iter(model.generate_batch([prompt.tolist()], **arguments).values())).generated_tokens
        return model.generate(prompt[None], cache_implementation="paged", **arguments)[0, 0, len(prompt) :].tolist()

    assert run("moe") == in_moe
    with pytest.raises(ValueError, match="continuous batching puts all requests into one"):
        run("cross_example")
    model.generation_config.mixing = "moe"
    assert run(None) == in_moe
    assert model.config.inference_mixing == "per_sequence"


def test_calls_from_several_threads_keep_their_modes(model: MoTForCausalLM, prompts: list[Tensor]) -> None:
    prompt, modes = prompts[2], ["moe", "per_sequence"] * 2
    expected = [generate(model, prompt[None], mixing=mode)[0].tokens for mode in modes]
    assert expected[0] != expected[1]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda mode: continue_in_pages(model, prompt, "generate_batch", mode), modes))
    assert found == expected
    assert model.config.inference_mixing == "per_sequence"


def test_a_mask_without_padding_may_come_along(model: MoTForCausalLM, prompts: list[Tensor]) -> None:
    ids = prompts[2].tolist()
    for mask in (None, [[1] * len(ids)]):
        model.generate_batch(
            [ids], max_new_tokens=1, attention_mask=mask, continuous_batching_config=few_small_pages()
        )
    with pytest.raises(ValueError, match="`attention_mask` has padding"):
        model.generate_batch([ids], max_new_tokens=1, attention_mask=[[0] * len(ids)])


@pytest.mark.parametrize("entrance", ["generate_batch", "generate"])
def test_continuous_batching_refuses_cross_example_and_unknown_modes(
    model: MoTForCausalLM, prompts: list[Tensor], entrance: str
) -> None:
    model.model.embed_tokens.register_forward_pre_hook(lambda *_: pytest.fail("computed something"))
    with pytest.raises(ValueError, match="must be one of 'cross_example', 'per_sequence', 'moe', got 'both'"):
        continue_in_pages(model, prompts[0], entrance, "both")
    with pytest.raises(ValueError, match="continuous batching puts all requests into one"):
        continue_in_pages(model, prompts[0], entrance, "cross_example")
    model.set_mixing(inference_mixing="cross_example")
    with pytest.raises(ValueError, match="continuous batching puts all requests into one"):
        continue_in_pages(model, prompts[0], entrance, None)


@pytest.mark.parametrize("mode", INDEPENDENT_MODES)
def test_a_compiled_forward_generates_the_same(model: MoTForCausalLM, mode: str) -> None:
    ids = random_ids(2, 5)
    expected = alone(model, list(ids), mixing=mode)
    with fresh_compiler():
        model.forward = torch.compile(model.forward, backend="aot_eager")
        compiled = generate(model, ids, mixing=mode, cache_implementation="static")
    assert_same(compiled, expected)


STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "without_cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "chunked": {"prefill_chunk_size": 2},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "lookup": {"prompt_lookup_num_tokens": 2},
    "assisted": {"assistant_model": "itself"},
    "pipeline": {},
}


def serve_by(strategy: str, model: MoTForCausalLM, **arguments: Any) -> list[list[int]]:
    """New tokens of a prompt of 5 tokens."""
    ids = random_ids(1, 5, seed=2)
    greedy = {"max_new_tokens": NUM_NEW_TOKENS, "min_new_tokens": NUM_NEW_TOKENS, "do_sample": False}
    arguments = greedy | STRATEGIES[strategy] | arguments
    if arguments.get("assistant_model") == "itself":
        arguments["assistant_model"] = model
    torch.manual_seed(1)
    if strategy != "pipeline":
        return model.generate(ids, **arguments)[:, 5:].tolist()
    backend = TokenizerBackend(models.WordLevel({str(token): token for token in range(97)}, unk_token=str(PAD)))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=str(PAD), eos_token=str(EOS))
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    text = generator(" ".join(map(str, ids[0].tolist())), return_full_text=False, **arguments)[0]["generated_text"]
    return [[int(word) for word in text.split()]]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_mode_of_a_call_gives_the_results_of_a_model_in_that_mode(model: MoTForCausalLM, strategy: str) -> None:
    in_moe = copy.deepcopy(model).set_mixing(inference_mixing="moe")
    actual = serve_by(strategy, model, mixing="moe")
    assert actual == serve_by(strategy, in_moe)
    assert actual != serve_by(strategy, model)
    assert serve_by(strategy, model) == serve_by(strategy, in_moe, mixing="per_sequence")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_unknown_mode_is_refused_before_anything_is_computed(model: MoTForCausalLM, strategy: str) -> None:
    with (
        counted_calls(model.model.embed_tokens) as calls,
        pytest.raises(ValueError, match="`mixing` must be one of 'cross_example', 'per_sequence', 'moe', got 'both'"),
    ):
        serve_by(strategy, model, mixing="both")
    assert calls == []


@torch.no_grad()
def test_an_unknown_mode_leaves_a_cache_as_it_was(model: MoTForCausalLM) -> None:
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=16)):
        model(random_ids(1, 4), past_key_values=cache)
        with pytest.raises(ValueError, match="`mixing` must be one of"):
            model(random_ids(1, 1), past_key_values=cache, mixing="both")
        assert cache.get_seq_length() == 4
