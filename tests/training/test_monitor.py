"""The mixing monitor: values against hand-made matrices, and in runs of the real `Trainer`."""

from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import Trainer

from mot_hf import MoTForCausalLM
from mot_hf.training import MixingMonitor
from mot_hf.training.monitor import count_choices, measure_mixing, split_layers
from tests.models import tiny_config
from tests.training.trainers import ROWS, losses_of, make_trainer


def measure(logits: Tensor, tokens: Tensor, mask: Tensor | None = None) -> dict[str, float]:
    """The values for one group [G, 1] with logits [G, E] and tokens [G, D]."""
    values = measure_mixing(tokens[:, None], logits, mask, group_size=len(tokens))
    return {key: float(value) for key, value in values.items()}


class TestValues:
    def test_uniform_weights_mix_all_tokens(self) -> None:
        values = measure(torch.zeros(4, 3), torch.eye(4))
        assert values == pytest.approx(
            {
                "entropy": 1.0,
                "largest_weight": 0.25,
                "effective_tokens": 4.0,
                "mixture_similarity": 1.0,
                "full_groups": 1.0,
            }
        )

    def test_experts_with_a_token_each_share_nothing(self) -> None:
        values = measure(100 * torch.eye(4), torch.eye(4))
        assert values["entropy"] == pytest.approx(0, abs=1e-6)
        assert values["largest_weight"] == pytest.approx(1)
        assert values["effective_tokens"] == pytest.approx(1)
        assert values["mixture_similarity"] == pytest.approx(0, abs=1e-6)

    def test_weights_of_a_half_a_quarter_and_an_eighth(self) -> None:
        weights = torch.tensor([0.5, 0.25, 0.125, 0.125])
        values = measure(weights.log()[:, None], torch.eye(4))
        assert values["entropy"] == pytest.approx(1.75 * log(2) / log(4))
        assert values["largest_weight"] == pytest.approx(0.5)
        assert values["effective_tokens"] == pytest.approx(1 / (0.25 + 0.0625 + 2 * 0.015625))

    def test_similarity_is_the_cosine_of_the_mixtures(self) -> None:
        # Two experts that each take one of two tokens at an angle of 60 degrees.
        tokens = torch.tensor([[1.0, 0.0], [0.5, 3**0.5 / 2]])
        values = measure(100 * torch.eye(2), tokens)
        assert values["mixture_similarity"] == pytest.approx(0.5)

    def test_padding_takes_no_part(self) -> None:
        logits, tokens = torch.randn(4, 3), torch.randn(4, 5)
        mask = torch.tensor([True, False, True, True])[:, None]
        padded = measure(logits, tokens, mask)
        alone = measure(logits[mask[:, 0]], tokens[mask[:, 0]])
        assert padded["full_groups"] == 0
        assert {**padded, "full_groups": 1.0} == pytest.approx(alone)

    def test_nothing_but_padding_gives_zeros(self) -> None:
        values = measure(torch.randn(4, 3), torch.randn(4, 5), torch.zeros(4, 1, dtype=torch.bool))
        assert set(values.values()) == {0.0}

    def test_means_over_groups_and_a_last_short_one(self) -> None:
        # Groups of 2: one uniform, one on a single token, one short.
        logits = torch.tensor([[0.0], [0.0], [100.0], [0.0], [7.0]])
        values = measure_mixing(torch.randn(5, 1, 3), logits, None, group_size=2)
        assert float(values["entropy"]) == pytest.approx(0.5)  # a group of one has none
        assert float(values["largest_weight"]) == pytest.approx((0.5 + 1 + 1) / 3)
        assert float(values["full_groups"]) == pytest.approx(2 / 3)

    def test_at_most_64_groups_spread_over_the_columns_are_looked_at(self) -> None:
        tokens, logits = torch.randn(4, 200, 3), torch.randn(4, 200, 2)
        values = measure_mixing(tokens, logits.flatten(0, 1), None, group_size=4)
        sample = measure_mixing(tokens[:, ::4], logits[:, ::4].flatten(0, 1), None, group_size=4)
        assert values == sample


def test_a_choice_is_counted_by_the_thresholds_and_not_for_padding() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [0.0, 5.0, 4.0]])
    assert count_choices(logits, None, None, 1).tolist() == [2, 1, 0]
    assert count_choices(logits, None, None, 2).tolist() == [2, 3, 1]
    assert count_choices(logits, None, torch.tensor([2.5, 0.0, 0.0]), 1).tolist() == [0, 3, 0]
    mask = torch.tensor([[True], [False], [True]])
    assert count_choices(logits, mask, None, 1).tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    ("num_layers", "ranges"),
    [(1, [[0]]), (3, [[0], [1], [2]]), (6, [[0], [1, 2], [3], [4, 5]]), (8, [[0, 1], [2, 3], [4, 5], [6, 7]])],
)
def test_layers_are_split_into_at_most_four_ranges(num_layers: int, ranges: list[list[int]]) -> None:
    assert split_layers(list(range(num_layers))) == ranges


def mixing_logs(trainer: Trainer) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if any(name.startswith("mixing/") for name in entry)]


def run(folder: Path, num_layers: int = 4, **arguments: Any) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model = MoTForCausalLM(tiny_config(num_hidden_layers=num_layers))
    trainer = make_trainer(model, folder, **arguments)
    trainer.add_callback(MixingMonitor(trainer))
    trainer.train()
    return mixing_logs(trainer)


class TestRuns:
    def test_tensorboard_shows_the_values(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
        logs = run(tmp_path, max_steps=2, logging_steps=1, report_to="tensorboard")
        board = EventAccumulator(str(tmp_path / "board")).Reload()
        shown = [event.value for event in board.Scalars("train/mixing/entropy/layers_2")]
        assert shown == pytest.approx([entry["mixing/entropy/layers_2"] for entry in logs])

    def test_logs_beside_every_loss(self, tmp_path: Path) -> None:
        logs = run(tmp_path, max_steps=6, logging_steps=2)
        assert [entry["step"] for entry in logs] == [2, 4, 6]
        for entry in logs:
            for layer in (2, 3):
                assert 0 < entry[f"mixing/entropy/layers_{layer}"] <= 1
                assert 0.25 <= entry[f"mixing/largest_weight/layers_{layer}"] <= 1
                assert 1 <= entry[f"mixing/effective_tokens/layers_{layer}"] <= 4
                # Before the first log nothing was expected.
                assert entry["step"] == 2 or 0 < entry[f"mixing/companion_drift/layers_{layer}"] < 2
            assert entry["mixing/full_groups"] == 1

    def test_the_first_values_are_those_of_the_first_batch(self, tmp_path: Path) -> None:
        (logs,) = run(tmp_path, max_steps=1, logging_steps=1)
        torch.manual_seed(0)
        model = MoTForCausalLM(tiny_config()).train()
        tokens, logits = [], []
        gate = model.model.layers[2].mlp.gate
        gate.register_forward_hook(lambda module, inputs, output: tokens.append(inputs[0]))
        gate.register_forward_hook(lambda module, inputs, output: logits.append(output))
        model(torch.tensor(ROWS[:8]))
        values = measure_mixing(tokens[0], logits[0], None, group_size=4)
        for key in ("entropy", "largest_weight", "effective_tokens", "mixture_similarity"):
            assert logs[f"mixing/{key}/layers_2"] == pytest.approx(float(values[key]), rel=1e-5)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_gradient_checkpointing_changes_no_value(self, tmp_path: Path, use_reentrant: bool) -> None:
        plain = run(tmp_path / "plain", max_steps=2, logging_steps=1)
        checkpointed = run(
            tmp_path / "checkpointed",
            max_steps=2,
            logging_steps=1,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
        )
        assert checkpointed == [pytest.approx(entry, rel=1e-5) for entry in plain]

    def test_accumulation_averages_over_all_micro_batches(self, tmp_path: Path) -> None:
        # With a learning rate of 0 two steps of one batch see what one step of two micro-batches sees.
        apart = run(tmp_path / "apart", max_steps=2, logging_steps=1, learning_rate=0.0)
        (joined,) = run(
            tmp_path / "joined", max_steps=1, logging_steps=1, learning_rate=0.0, gradient_accumulation_steps=2
        )
        for key in ("entropy", "largest_weight", "mixture_similarity"):
            name = f"mixing/{key}/layers_2"
            assert joined[name] == pytest.approx((apart[0][name] + apart[1][name]) / 2, rel=1e-5)

    def test_short_groups_show(self, tmp_path: Path) -> None:
        logs = run(tmp_path, max_steps=1, logging_steps=1, per_device_train_batch_size=6)
        assert logs[0]["mixing/full_groups"] == 0.5

    @pytest.mark.parametrize("mode", ["per_sequence", "moe"])
    def test_loads_are_those_of_the_experts_that_run(self, mode: str, tmp_path: Path) -> None:
        loads = []

        def keep(experts: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if experts.training and torch.is_grad_enabled():  # not while statistics are gathered
                loads.append(inputs[1].flatten().bincount(minlength=8).float())

        torch.manual_seed(0)
        model = MoTForCausalLM(tiny_config(mixing=mode, router_initializer_range=1.0, num_experts_per_tok=1))
        model.model.layers[2].mlp.experts.register_forward_hook(keep)
        trainer = make_trainer(model, tmp_path, max_steps=1, logging_steps=1, gradient_accumulation_steps=2)
        trainer.add_callback(MixingMonitor(trainer))
        trainer.train()
        (logs,) = mixing_logs(trainer)
        total = loads[0] + loads[1]  # of both micro-batches
        assert total.sum() == 2 * 8 * 12
        assert logs["mixing/busiest_expert/layers_2"] == pytest.approx(float(total.max() / total.mean()))
        assert logs["mixing/idle_experts/layers_2"] == float((total == 0).sum())
        assert "mixing/full_groups" not in logs

    def test_training_is_the_same_and_the_model_is_left_without_hooks(self, tmp_path: Path) -> None:
        losses = []
        for monitored in (False, True):
            torch.manual_seed(0)
            model = MoTForCausalLM(tiny_config())
            trainer = make_trainer(model, tmp_path, max_steps=3, logging_steps=1)
            if monitored:
                trainer.add_callback(MixingMonitor(trainer))
            trainer.train()
            losses.append(losses_of(trainer))
            assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert losses[0] == losses[1]
        assert len(losses[0]) == 3
