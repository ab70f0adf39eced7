"""`torch.export` and ONNX: one graph for any number of rows and columns, with the results of eager mode."""

import io
from math import log
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from mot_hf import MoTForCausalLM, MoTForMaskedLM, MoTForSequenceClassification, MoTPreTrainedModel
from tests.models import PAD, companions_of, random_ids, tiny_config, trained

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

slow = pytest.mark.slow

# Rows and columns: fewer than the graph was made with, more, one, and rows longer than `max_position_embeddings`.
SIZES = [(1, 1), (1, 7), (5, 3), (2, 40), (7, 100)]


def padded_batches() -> list[dict[str, Tensor]]:
    """Batches of every size without padding, with padding on the left and on the right."""
    batches = []
    for num_rows, num_columns in SIZES:
        columns = torch.arange(num_columns)
        num_padding = torch.arange(num_rows)[:, None] % num_columns % 4
        full = torch.ones(num_rows, num_columns, dtype=torch.bool)
        for is_token in (full, columns >= num_padding, columns < num_columns - num_padding):
            ids = random_ids(num_rows, num_columns, seed=num_columns).masked_fill(~is_token, PAD)
            batches.append({"input_ids": ids, "attention_mask": is_token.long()})
    return batches


def small_model(
    head: type[MoTPreTrainedModel], mode: str = "per_sequence", experts: str = "grouped_mm"
) -> MoTPreTrainedModel:
    # Exporting takes time for each layer.
    sizes = {"num_hidden_layers": 1, "mlp_layer_types": ["sparse"]}
    model = trained(head(tiny_config(**sizes, use_cache=False, inference_mixing=mode)))
    model.set_experts_implementation(experts)
    return model


def export(model: MoTPreTrainedModel) -> ExportedProgram:
    inputs = {name: torch.ones(2, 9, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    shapes = {name: {0: Dim("rows"), 1: Dim("columns")} for name in inputs}
    return torch.export.export(model, (), inputs, dynamic_shapes=shapes)


def on_tokens(logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Logits without those of padding."""
    return logits[inputs["attention_mask"].bool()] if logits.ndim == 3 else logits


@pytest.mark.parametrize(
    ("head", "mode", "experts", "attention"),
    [
        (MoTForCausalLM, "per_sequence", "grouped_mm", "sdpa"),
        pytest.param(MoTForCausalLM, "per_sequence", "batched_mm", "eager", marks=slow),
        (MoTForCausalLM, "moe", "grouped_mm", "sdpa"),
        pytest.param(MoTForCausalLM, "moe", "batched_mm", "sdpa", marks=slow),
        (MoTForMaskedLM, "per_sequence", "grouped_mm", "sdpa"),
        (MoTForSequenceClassification, "per_sequence", "grouped_mm", "sdpa"),
    ],
)
@torch.no_grad()
def test_one_graph_serves_batches_of_every_size(
    head: type[MoTPreTrainedModel], mode: str, experts: str, attention: str
) -> None:
    model = small_model(head, mode, experts)
    model.set_attn_implementation(attention)
    graph = export(model).module()
    for inputs in padded_batches():
        actual, expected = graph(**inputs).logits, model(**inputs).logits
        torch.testing.assert_close(on_tokens(actual, inputs), on_tokens(expected, inputs), atol=1e-5, rtol=0)


@slow
@torch.no_grad()
def test_a_graph_can_be_saved_and_loaded() -> None:
    program = export(small_model(MoTForCausalLM))
    file = io.BytesIO()
    torch.export.save(program, file)
    graph, loaded = program.module(), torch.export.load(file).module()
    for inputs in padded_batches():
        torch.testing.assert_close(loaded(**inputs).logits, graph(**inputs).logits, atol=0, rtol=0)


@torch.no_grad()
def test_statistics_stay_float32_in_a_bfloat16_graph() -> None:
    model = small_model(MoTForCausalLM).to(torch.bfloat16)
    program = export(model)
    statistics = {name: value for name, value in program.state_dict.items() if ".companions." in name}
    torch.testing.assert_close(statistics, companions_of(model), atol=0, rtol=0)
    assert program.state_dict["lm_head.weight"].dtype == torch.bfloat16
    graph = program.module()
    for inputs in padded_batches():
        actual, expected = graph(**inputs).logits, model(**inputs).logits
        # A graph's experts round at other places: by the tolerance that torch has for bfloat16.
        torch.testing.assert_close(on_tokens(actual, inputs), on_tokens(expected, inputs), atol=1e-2, rtol=1.6e-2)


def export_to_onnx(model_dir: Path, head: type[MoTPreTrainedModel] = MoTForCausalLM) -> Path:
    """The lines of docs/guides/quantize.md."""
    model = head.from_pretrained(model_dir, use_cache=False, experts_implementation="batched_mm")
    inputs = {name: torch.ones(2, 8, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    shapes = {name: {0: Dim("rows"), 1: Dim("columns")} for name in inputs}
    file = model_dir / "model.onnx"
    torch.onnx.export(model, (), file, kwargs=inputs, dynamic_shapes=shapes, output_names=["logits"], dynamo=True)
    return file


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model and its graph in a folder."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    small_model(MoTForCausalLM).save_pretrained(folder)
    export_to_onnx(folder)
    return folder


def open_session(file: Path) -> "InferenceSession":
    onnxruntime = pytest.importorskip("onnxruntime")
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def run(session: "InferenceSession", inputs: dict[str, Tensor]) -> Tensor:
    (logits,) = session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})
    return torch.from_numpy(logits)


def assert_same_logits(session: "InferenceSession", model: MoTPreTrainedModel) -> None:
    for inputs in padded_batches():
        with torch.no_grad():
            expected = model(**inputs).logits
        actual = run(session, inputs)
        torch.testing.assert_close(on_tokens(actual, inputs), on_tokens(expected, inputs), atol=1e-5, rtol=0)


@slow
def test_onnx_gives_the_logits_of_batches_of_every_size(model_dir: Path) -> None:
    assert_same_logits(open_session(model_dir / "model.onnx"), MoTForCausalLM.from_pretrained(model_dir))


@slow
def test_onnx_writes_the_text_that_generate_writes(model_dir: Path) -> None:
    session, ids = open_session(model_dir / "model.onnx"), random_ids(3, 5)
    expected = MoTForCausalLM.from_pretrained(model_dir).generate(
        ids, max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    for _ in range(8):
        logits = run(session, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        ids = torch.cat([ids, logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    assert ids.tolist() == expected.tolist()


@slow
def test_onnx_holds_the_router_and_the_statistics_in_float32(model_dir: Path) -> None:
    onnx = pytest.importorskip("onnx")
    stored = [onnx.numpy_helper.to_array(value) for value in onnx.load(model_dir / "model.onnx").graph.initializer]
    model = MoTForCausalLM.from_pretrained(model_dir)
    block = model.model.layers[0].mlp
    expected = block.companions.expected()
    # The numbers of batches are not needed, and log_mass is held with the log of the group's size added.
    shifted = expected.log_mass + log(model.config.group_size - 1)
    for wanted in (block.gate.weight.detach(), shifted, *expected[1:]):
        assert any(value.dtype == "float32" and np.array_equal(value, wanted.numpy()) for value in stored)


@slow
@pytest.mark.parametrize(
    ("head", "mode"),
    [
        (MoTForMaskedLM, "moe"),
        (MoTForSequenceClassification, "per_sequence"),
    ],
)
def test_onnx_serves_other_modes_and_heads(head: type[MoTPreTrainedModel], mode: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    model = small_model(head, mode)
    model.save_pretrained(tmp_path)
    assert_same_logits(open_session(export_to_onnx(tmp_path, head)), model)
