"""Other rows against a victim's: nothing that they hold or do changes its logits where rows are not to be mixed."""

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, ContinuousBatchingConfig, DynamicCache, StaticCache

from mot_hf import MoTForCausalLM
from tests.models import companions_of, random_ids, tiny_config, trained

INDEPENDENT_MODES = ["per_sequence", "moe"]
NUM_ROWS, NUM_COLUMNS, NUM_PREFILLED = 4, 7, 5
VICTIM, BYSTANDER = 0, 3
ATTACKERS = [1, 2]
CONTENTS = {"huge": 1e30, "nan": math.nan, "inf": math.inf}


@functools.cache
def make_model(experts: str = "grouped_mm", attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = tiny_config(num_hidden_layers=3, mlp_layer_types=["sparse", "dense", "sparse"])
    model = trained(MoTForCausalLM(config)).to(dtype)
    model.set_experts_implementation(experts)
    model.set_attn_implementation(attention)
    return model.requires_grad_(False)


def embed(model: MoTForCausalLM, ids: Tensor) -> Tensor:
    return model.get_input_embeddings()(ids).detach().clone()


def filled(embeddings: Tensor, attack: str) -> Tensor:
    """What the attackers send in place of their embeddings."""
    if attack == "copy":
        return embeddings[VICTIM].clone()
    return torch.tensor(CONTENTS[attack], dtype=embeddings.dtype)


def poison(cache: Cache, rows: list[int]) -> None:
    """Overwrite all that a cache holds of some rows, and what it has reserved for them."""
    for layer in cache.layers:
        assert layer.keys is not None
        assert layer.values is not None
        layer.keys[rows] = math.nan
        layer.values[rows] = math.nan


def prefill_and_decode(
    model: MoTForCausalLM,
    embeddings: Tensor,
    attention_mask: Tensor,
    mode: str,
    cache_kind: str,
    poisoned_rows: list[int] | None = None,
) -> Tensor:
    """Logits [B, T, vocab_size] of a prefill and of single steps, between which rows of the cache may be poisoned."""
    cache = (
        StaticCache(config=model.config, max_cache_len=NUM_COLUMNS + 2)
        if cache_kind == "static"
        else DynamicCache(config=model.config)
    )
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    logits = []
    for start, end in [(0, NUM_PREFILLED), *((column, column + 1) for column in range(NUM_PREFILLED, NUM_COLUMNS))]:
        output = model(
            inputs_embeds=embeddings[:, start:end],
            attention_mask=attention_mask[:, :end],
            position_ids=position_ids[:, start:end],
            past_key_values=cache,
            mixing=mode,
        )
        logits.append(output.logits)
        if poisoned_rows is not None and start == 0:
            poison(cache, poisoned_rows)
    return torch.cat(logits, dim=1)


def attacked(
    model: MoTForCausalLM, attack: str, embeddings: Tensor, mask: Tensor, mode: str, cache_kind: str
) -> Tensor:
    """The victim's logits under one attack."""
    embeddings, mask, order = embeddings.clone(), mask.clone(), torch.arange(NUM_ROWS)
    poisoned_rows = None
    if attack == "poisoned_cache":
        poisoned_rows = ATTACKERS
    elif attack == "padding_only":
        mask[ATTACKERS] = 0
    elif attack == "permuted":
        order = torch.tensor([2, 3, 1, 0])
    elif attack.endswith("_when_decoding"):
        embeddings[ATTACKERS, NUM_PREFILLED:] = filled(embeddings[:, NUM_PREFILLED:], attack.split("_")[0])
    else:
        embeddings[ATTACKERS] = filled(embeddings, attack)
    logits = prefill_and_decode(model, embeddings[order], mask[order], mode, cache_kind, poisoned_rows)
    return logits[order.tolist().index(VICTIM)]


def is_exact(attack: str, experts: str, attention: str, dtype: torch.dtype) -> bool:
    """Whether a row's result keeps every bit on a CPU whatever the other rows are."""
    # Padding gives sdpa a mask where it had none.
    if (attack, attention) == ("padding_only", "sdpa"):
        return False
    # In float32 the products of experts other than batched_mm's have as many rows as tokens were sent to an expert,
    # and that chooses the kernel, as does a row's place among the others.
    return dtype == torch.bfloat16 or (experts == "batched_mm" and attack != "permuted")


def assert_untouched(actual: Tensor, expected: Tensor, attack: str, exact: bool) -> None:
    assert expected.isfinite().all()
    tolerance = 0.0 if exact else 1e-5 if actual.dtype == torch.float32 else 2**-6
    torch.testing.assert_close(
        actual, expected, atol=tolerance, rtol=tolerance, msg=lambda difference: f"{attack}: {difference}"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("cache_kind", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("mode", INDEPENDENT_MODES)
@torch.no_grad()
def test_no_attack_changes_a_logit_of_the_victim(
    mode: str, padded: bool, cache_kind: str, experts: str, attention: str, dtype: torch.dtype
) -> None:
    model = make_model(experts, attention, dtype)
    embeddings = embed(model, random_ids(NUM_ROWS, NUM_COLUMNS))
    num_padding = torch.tensor([2, 0, 1, 0]) * padded
    mask = (torch.arange(NUM_COLUMNS) >= num_padding[:, None]).long()
    clean = prefill_and_decode(model, embeddings, mask, mode, cache_kind)[VICTIM]
    attacks = ["permuted", "padding_only", "poisoned_cache", "copy", *CONTENTS]
    attacks += [f"{content}_when_decoding" for content in CONTENTS]
    for attack in attacks:
        actual = attacked(model, attack, embeddings, mask, mode, cache_kind)
        exact = is_exact(attack, experts, attention, dtype)
        assert_untouched(actual[num_padding[VICTIM] :], clean[num_padding[VICTIM] :], attack, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mode", INDEPENDENT_MODES)
@torch.no_grad()
def test_an_attack_leaves_the_bystanders_alone_and_reaches_the_attackers(mode: str, dtype: torch.dtype) -> None:
    model = make_model(dtype=dtype)
    embeddings = embed(model, random_ids(NUM_ROWS, NUM_COLUMNS))
    mask = torch.ones(NUM_ROWS, NUM_COLUMNS, dtype=torch.long)
    clean = prefill_and_decode(model, embeddings, mask, mode, "dynamic")
    dirty = prefill_and_decode(model, embeddings, mask, mode, "dynamic", poisoned_rows=ATTACKERS)
    assert_untouched(dirty[BYSTANDER], clean[BYSTANDER], "poisoned_cache", exact=dtype == torch.bfloat16)
    assert dirty[ATTACKERS, NUM_PREFILLED:].isnan().all()


STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "without_cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 3, "num_return_sequences": 3},
    "static_beams": {"num_beams": 3, "num_return_sequences": 3, "cache_implementation": "static"},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("mode", INDEPENDENT_MODES)
def test_no_prompt_changes_what_is_generated_for_another(mode: str, experts: str, strategy: str) -> None:
    model = make_model(experts)
    embeddings = embed(model, random_ids(NUM_ROWS, NUM_COLUMNS))
    mask = torch.ones(NUM_ROWS, NUM_COLUMNS, dtype=torch.long)
    mask[VICTIM, :3] = 0
    arguments = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "mixing": mode} | STRATEGIES[strategy]
    arguments |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    num_sequences = arguments.get("num_return_sequences", 1)

    def generate(embeddings: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, scores of the beams, and logits at every step, of the victim's sequences or beams."""
        output = model.generate(inputs_embeds=embeddings, attention_mask=mask, **arguments)
        victims = slice(VICTIM * num_sequences, (VICTIM + 1) * num_sequences)
        scores = output.sequences_scores[victims] if num_sequences > 1 else torch.zeros(1)
        return output.sequences[victims], scores, torch.stack([step[victims] for step in output.logits])

    tokens, scores, logits = generate(embeddings, mask)
    for attack in ("padding_only", "copy", *CONTENTS):
        attacked_embeddings, attacked_mask = embeddings.clone(), mask.clone()
        if attack == "padding_only":
            attacked_mask[ATTACKERS] = 0
        else:
            attacked_embeddings[ATTACKERS] = filled(embeddings, attack)
        attacked_tokens, attacked_scores, attacked_logits = generate(attacked_embeddings, attacked_mask)
        assert torch.equal(attacked_tokens, tokens)
        assert_untouched(attacked_scores, scores, attack, exact=False)
        assert_untouched(attacked_logits, logits, attack, exact=False)


@pytest.mark.parametrize("mode", INDEPENDENT_MODES)
def test_a_continuously_batched_request_is_untouched_by_huge_ones(mode: str) -> None:
    model = make_model.__wrapped__()
    model.set_mixing(inference_mixing=mode)
    poisonous = 96
    model.get_input_embeddings().weight[poisonous] = 1e30
    victim, other = (random_ids(1, length, seed=length)[0] % poisonous for length in (6, 3))
    expected = model.generate(victim[None], max_new_tokens=6, do_sample=False)[0, 6:].tolist()
    requests = [victim.tolist(), [poisonous] * 7, [*other.tolist(), poisonous]]
    memory = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=16)
    for order in ([0, 1, 2], [1, 0, 2], [2, 1, 0]):
        inputs = [requests[index] for index in order]
        results = model.generate_batch(inputs, max_new_tokens=6, continuous_batching_config=memory)
        assert list(results.values())[order.index(0)].generated_tokens == expected


@pytest.mark.parametrize("cache_kind", ["dynamic", "static"])
@pytest.mark.parametrize("mode", ["cross_example", *INDEPENDENT_MODES])
@torch.no_grad()
def test_an_attack_leaves_nothing_behind_in_the_model(mode: str, cache_kind: str) -> None:
    model = make_model()
    embeddings = embed(model, random_ids(NUM_ROWS, NUM_COLUMNS))
    mask = torch.ones(NUM_ROWS, NUM_COLUMNS, dtype=torch.long)
    companions = companions_of(model)
    clean = {name: prefill_and_decode(model, embeddings, mask, name, cache_kind) for name in INDEPENDENT_MODES}
    for attack in ("poisoned_cache", *CONTENTS):
        attacked(model, attack, embeddings, mask, mode, cache_kind)
        for name, expected in clean.items():
            assert torch.equal(prefill_and_decode(model, embeddings, mask, name, cache_kind), expected)
    torch.testing.assert_close(companions_of(model), companions, atol=0, rtol=0)


@torch.no_grad()
def test_these_attacks_succeed_where_rows_are_mixed() -> None:
    model = make_model()
    embeddings = embed(model, random_ids(NUM_ROWS, NUM_COLUMNS))
    mask = torch.ones(NUM_ROWS, NUM_COLUMNS, dtype=torch.long)
    clean = prefill_and_decode(model, embeddings, mask, "cross_example", "dynamic")[VICTIM]
    for attack in ("padding_only", "poisoned_cache", "copy", *CONTENTS):
        actual = attacked(model, attack, embeddings, mask, "cross_example", "dynamic")
        assert not torch.allclose(actual, clean, atol=1e-3)
