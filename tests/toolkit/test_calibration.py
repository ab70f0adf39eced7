"""`calibrate`: exact statistics, in one process and in two, and what it refuses."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from mot_hf import MoTForCausalLM, MoTForMaskedLM, MoTModel
from mot_hf.calibration import calibrate
from mot_hf.modeling.companions_mot import MoTCompanions
from tests.models import companions_of, random_ids, tiny_config, trained


def make_batches(*num_rows: int, num_columns: int = 6) -> list[dict[str, Tensor]]:
    ids = [random_ids(rows, num_columns, seed=seed) for seed, rows in enumerate(num_rows)]
    return [{"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows} for rows in ids]


def statistics_of_one_pass(model: MoTForCausalLM, ids: Tensor) -> dict[str, Tensor]:
    """What a model without earlier statistics gathers from all rows at once: their plain means."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, MoTCompanions):
            for buffer in module.buffers():
                buffer.zero_()
    with torch.no_grad():
        model(ids, mixing="cross_example")
    return without_counts(companions_of(model))


def without_counts(statistics: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in statistics.items() if ".num_" not in name}


def counts_of(model: MoTForCausalLM) -> set[int]:
    return {int(value) for name, value in companions_of(model).items() if name.endswith("num_batches_tracked")}


@pytest.mark.parametrize("head", [MoTForCausalLM, MoTForMaskedLM, MoTModel])
def test_statistics_are_the_means_over_all_full_groups(head: type[MoTForCausalLM]) -> None:
    model = trained(head(tiny_config()))
    batches = make_batches(4, 8, 4)
    expected = statistics_of_one_pass(model, torch.cat([batch["input_ids"] for batch in batches]))
    for _ in range(2):  # earlier statistics do not matter
        calibrate(model, batches, show_progress=False)
        torch.testing.assert_close(without_counts(companions_of(model)), expected, atol=1e-6, rtol=1e-5)
        assert counts_of(model) == {3}


def test_a_model_trained_in_per_sequence_gets_the_statistics_that_training_gathers() -> None:
    config = tiny_config(mixing="per_sequence", live_companions=True, companion_momentum=1.0)
    model = trained(MoTForCausalLM(config))
    ids = random_ids(8, 6, seed=1)
    by_training = copy.deepcopy(model).train()
    by_training(ids)
    calibrate(model, [{"input_ids": ids}], show_progress=False)
    expected = without_counts(companions_of(by_training))
    torch.testing.assert_close(without_counts(companions_of(model)), expected, atol=1e-6, rtol=1e-5)
    before = companions_of(model)
    model(ids)  # once it is calibrated, answering changes nothing
    assert all(map(torch.equal, before.values(), companions_of(model).values()))


def test_fixed_statistics_are_replaced_by_those_of_mixing() -> None:
    model = trained(MoTForCausalLM(tiny_config(mixing="per_sequence")))
    (batch,) = make_batches(8)
    expected = statistics_of_one_pass(model, batch["input_ids"])
    calibrate(model, [batch], show_progress=False)
    torch.testing.assert_close(without_counts(companions_of(model)), expected, atol=1e-6, rtol=1e-5)


def test_groups_count_by_their_tokens() -> None:
    model = trained(MoTForCausalLM(tiny_config(mlp_layer_types=["sparse", "dense", "dense", "dense"])))
    batches = make_batches(4, 3)
    batches[0]["attention_mask"][:2, 3:] = 0
    alone = []
    for batch in batches:
        one = copy.deepcopy(model)
        calibrate(one, [batch], show_progress=False)
        alone.append(without_counts(companions_of(one)))
    calibrate(model, batches, show_progress=False)
    num_tokens = [int(batch["attention_mask"].sum()) for batch in batches]
    for name, value in without_counts(companions_of(model)).items():
        if name.endswith("shift"):
            continue
        mean = sum(n * one[name] for n, one in zip(num_tokens, alone, strict=True)) / sum(num_tokens)
        torch.testing.assert_close(value, mean, atol=1e-6, rtol=1e-5)
        if name.endswith("log_mass"):
            continue
        shift_name = name.replace("mean_input", "input_shift").replace("mean_output", "output_shift")
        # Columns 0, 1-2 and 3-5 are the first three buckets; these are their numbers of tokens in the two batches.
        for bucket, counts in enumerate([(4, 3), (8, 6), (6, 9)]):
            bucket_means = [one[shift_name][bucket] + one[name].mean(0) for one in alone]
            bucket_mean = sum(n * m for n, m in zip(counts, bucket_means, strict=True)) / sum(counts)
            actual = companions_of(model)[shift_name][bucket] + value.mean(0)
            torch.testing.assert_close(actual, bucket_mean, atol=1e-6, rtol=1e-5)


def test_batches_of_padding_do_not_count() -> None:
    model = trained(MoTForCausalLM(tiny_config()))
    other = copy.deepcopy(model)
    batches = make_batches(4, 4)
    calibrate(model, batches[:1], show_progress=False)
    batches[1]["attention_mask"].zero_()
    calibrate(other, batches, show_progress=False)
    torch.testing.assert_close(without_counts(companions_of(other)), without_counts(companions_of(model)))


@pytest.mark.parametrize("training", [False, True])
def test_nothing_but_the_statistics_changes(training: bool) -> None:
    model = trained(MoTForCausalLM(tiny_config())).train(training)
    before = copy.deepcopy(model.state_dict())
    calibrate(model, make_batches(4), show_progress=False)
    assert model.training is training
    assert not any(module._forward_hooks for module in model.modules())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(".companions." in name for name in changed)


def test_bfloat16_models_get_float32_statistics() -> None:
    model = trained(MoTForCausalLM(tiny_config()))
    low = copy.deepcopy(model).to(torch.bfloat16)
    calibrate(model, make_batches(8, 8), show_progress=False)
    calibrate(low, make_batches(8, 8), show_progress=False)
    for name, value in without_counts(companions_of(low)).items():
        assert value.dtype == torch.float32
        expected = companions_of(model)[name]
        assert (value - expected).norm() < 0.05 * expected.norm()


def test_a_model_without_mot_layers_is_refused() -> None:
    model = MoTForCausalLM(tiny_config(mlp_layer_types=["dense"] * 4))
    with pytest.raises(ValueError, match=r"MoTForCausalLM.* has no MoT layers"):
        calibrate(model, make_batches(4), show_progress=False)


@pytest.mark.parametrize("only_padding", [False, True])
def test_batches_without_a_token_are_refused_and_change_nothing(only_padding: bool) -> None:
    model = trained(MoTForCausalLM(tiny_config())).train()
    batches = make_batches(4) if only_padding else []
    for batch in batches:
        batch["attention_mask"].zero_()
    before = companions_of(model)
    with pytest.raises(ValueError, match="`batches` has no tokens"):
        calibrate(model, iter(batches), show_progress=False)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in companions_of(model).items())


def test_an_interrupted_pass_changes_nothing() -> None:
    model = trained(MoTForCausalLM(tiny_config())).train()
    before = companions_of(model)
    with pytest.raises(ValueError, match="exactly one of"):
        calibrate(model, [*make_batches(4), {"labels": random_ids(4, 6)}], show_progress=False)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in companions_of(model).items())


def spoil(model: MoTForCausalLM, token: int) -> None:
    """Give one token an embedding of NaN, as an overflow would."""
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = torch.nan


def test_batches_that_are_not_finite_are_left_out_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = trained(MoTForCausalLM(tiny_config()))
    batches = make_batches(4, 4, 8)
    for batch in batches:
        batch["input_ids"].clamp_(max=90)
    expected = copy.deepcopy(model)
    assert calibrate(expected, batches, show_progress=False) == 0
    spoil(model, 95)
    bad = {"input_ids": batches[0]["input_ids"].clone()}
    bad["input_ids"][2, 3] = 95
    with caplog.at_level(logging.WARNING, logger="mot_hf.calibration"):
        assert calibrate(model, [batches[0], bad, *batches[1:], bad], show_progress=False) == 2
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 5 batches were left out: their statistics are NaN or infinite."
    ]
    torch.testing.assert_close(companions_of(model), companions_of(expected), atol=0, rtol=0)


def test_no_finite_batch_is_refused_and_changes_nothing() -> None:
    model = trained(MoTForCausalLM(tiny_config())).train()
    before = companions_of(model)
    with torch.no_grad():
        model.get_parameter("model.layers.1.self_attn.v_proj.weight")[0, 0] = torch.nan
    padding = make_batches(4)[0]
    padding["attention_mask"].zero_()
    with pytest.raises(ValueError, match="The statistics of all 2 `batches` with tokens are NaN or infinite"):
        calibrate(model, [*make_batches(4, 4), padding], show_progress=False)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in companions_of(model).items())


def test_an_interruption_while_the_layers_are_written_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(MoTForCausalLM(tiny_config()))
    before, replace, calls = companions_of(model), MoTCompanions.replace, []

    def interrupt(companions: MoTCompanions, *arguments: Any) -> None:
        replace(companions, *arguments)
        calls.append(companions)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(MoTCompanions, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, make_batches(4), show_progress=False)
    assert all(torch.equal(value, before[name]) for name, value in companions_of(model).items())


def test_rarely_full_groups_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = trained(MoTForCausalLM(tiny_config()))
    with caplog.at_level(logging.WARNING, logger="mot_hf.calibration"):
        calibrate(model, make_batches(4, 3, 4), show_progress=False)
        assert not caplog.records
        calibrate(model, make_batches(4, 3, 2, 1), show_progress=False)
    assert "Only 25 % of the groups were full (group_size=4)" in caplog.text


@pytest.mark.parametrize("head", [MoTForCausalLM, MoTModel])
def test_a_model_without_statistics_says_so_once(head: type[MoTForCausalLM], monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr("mot_hf.modeling.modeling_mot.logger.warning", messages.append)
    model = head(tiny_config()).eval()
    model(random_ids(2, 4), mixing="moe")
    model(random_ids(2, 4), mixing="cross_example")
    assert messages == []
    for _ in range(2):
        model(random_ids(2, 4))
    assert len(messages) == 1
    assert "calibrate(model, batches)" in messages[0]
    calibrated = head(tiny_config())
    calibrate(calibrated, make_batches(4), show_progress=False)
    calibrated.eval()(random_ids(2, 4))
    assert len(messages) == 1


NUM_ROWS = {0: (4, 8, 4), 1: (8,)}


def raised_by(function: Callable[..., object], *args: Any, **kwargs: Any) -> type[BaseException] | None:
    try:
        function(*args, **kwargs)
    except ValueError as error:
        return type(error)
    return None


def calibrate_in_process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    model = trained(MoTForCausalLM(tiny_config()))
    all_batches = make_batches(*NUM_ROWS[0], *NUM_ROWS[1])
    for batch in all_batches:
        batch["input_ids"].clamp_(max=90)
    spoil(model, 96)
    bad = {"input_ids": torch.full((4, 6), 96)}
    batches = [*all_batches[:3], bad] if rank == 0 else [bad, *all_batches[3:], bad]
    assert calibrate(DistributedDataParallel(model), batches, show_progress=False) == 3
    assert ValueError is raised_by(calibrate, DistributedDataParallel(model), [bad] * rank, show_progress=False)
    torch.save(companions_of(model), folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_end_with_the_statistics_of_one(tmp_path: Path) -> None:
    multiprocessing.spawn(calibrate_in_process, args=(tmp_path,), nprocs=2)
    torch.manual_seed(0)
    model = trained(MoTForCausalLM(tiny_config()))
    batches = make_batches(*NUM_ROWS[0], *NUM_ROWS[1])
    for batch in batches:
        batch["input_ids"].clamp_(max=90)
    calibrate(model, batches, show_progress=False)
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), companions_of(model))
