"""What vLLM and SGLang demand of a model that they run by their backends for transformers, tested without them.

A server makes the backbone of the configuration alone, puts layers of its own in the place of experts, linear layers,
norms and embedding, loads the checkpoint by name, and runs all requests as one row with attention of its own. Here a
small server does the same.
"""

import inspect
import json
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AttentionInterface, AutoConfig, AutoModel

from mot_hf import MoTConfig, MoTForCausalLM, MoTForMaskedLM, MoTModel
from mot_hf.modeling import configuration_mot
from mot_hf.modeling.modeling_mot import MoTSparseBlock
from tests.compiling import fresh_compiler
from tests.models import random_ids, tiny_config, trained

LENGTHS = (7, 1, 5)
SERVED_MODES = ("per_sequence", "moe")
# What a server can do with a linear layer.
STYLES = {"colwise", "rowwise"}
# Beside them SGLang knows these, of experts and norms, and refuses others; the last is transformers' own addition.
OTHER_STYLES = {"packed_colwise", "moe_tp_experts", "replicated_with_grad_allreduce", "embedding_rowwise"}


class ServedExperts(nn.Module):
    """Experts of a server: the routed signature by position, weights in three dimensions, SiLU, and nothing else."""

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        for name, weight in experts.named_parameters():
            self.register_parameter(name, nn.Parameter(torch.empty(weight.shape)))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        gate_up = self.gate_up_proj[top_k_index] @ hidden_states[:, None, :, None]  # [S, K, 2F, 1]
        gate, up = gate_up.chunk(2, dim=2)
        outputs = self.down_proj[top_k_index] @ (F.silu(gate) * up)  # [S, K, D, 1]
        return (outputs.squeeze(-1) * top_k_weights[..., None]).sum(dim=1).to(hidden_states.dtype)


class ServedLinear(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(linear.weight.shape))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.linear(hidden_states, self.weight)


class ServedNorm(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(norm.weight.shape)), norm.variance_epsilon

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)


class ServedEmbedding(nn.Module):
    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(embedding.weight.shape))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


def replace_layers(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        weights = list(child.parameters())
        if name == "experts" and weights and all(weight.ndim == 3 for weight in weights):
            setattr(module, name, ServedExperts(child))
        elif isinstance(child, nn.Linear):
            setattr(module, name, ServedLinear(child))
        elif type(child).__name__.endswith("RMSNorm"):
            setattr(module, name, ServedNorm(child))
        else:
            replace_layers(child)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    attention_instances: dict[int, Callable[..., Tensor]] | None = None,
    forward_batch: object | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as the servers register it: by layer, from what they hand to the model beside its inputs."""
    assert attention_mask is None
    num_repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(num_repeats, dim=1), value.repeat_interleave(num_repeats, dim=1)
    # vLLM puts its attention into the module, SGLang and earlier versions of vLLM hand it over with every call.
    attention = attention_instances[module.layer_idx] if attention_instances else module.servers_attention
    return attention(query, key, value, forward_batch, scale=scaling).transpose(1, 2), None


def attend_to_requests(query: Tensor, key: Tensor, value: Tensor, batch: Any, scale: float | None) -> Tensor:
    """Causal attention within each request of a batch."""
    num_tokens = query.shape[2]
    mask = (batch.owner[:, None] == batch.owner) & torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


class Server:
    """A model as a server makes it of a checkpoint."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        AttentionInterface.register("server", attend)
        config = AutoConfig.from_pretrained(folder)
        config._attn_implementation = "server"
        with default_dtype(dtype):
            with init_empty_weights(include_buffers=False):
                self.backbone: Any = AutoModel.from_config(config, dtype=dtype)
            replace_layers(self.backbone)
            self.backbone.set_input_embeddings(ServedEmbedding(self.backbone.get_input_embeddings()))
            for module in self.backbone.modules():  # parameters that a server has no layer for
                for name, weight in module.named_parameters(recurse=False):
                    if weight.is_meta:
                        setattr(module, name, nn.Parameter(torch.empty(weight.shape, dtype=dtype)))
        self.load(folder)
        self.backbone.eval()
        for layer in self.backbone.layers:
            layer.self_attn.servers_attention = self.attend
        self.attention = dict.fromkeys(range(config.num_hidden_layers), attend_to_requests)

    def attend(self, *states: Tensor, scale: float | None) -> Tensor:
        """Attention of the batch that runs."""
        return attend_to_requests(*states[:3], self.batch, scale)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Fill parameters and buffers by the names in the checkpoint, which must be the same."""
        saved = load_file(folder / "model.safetensors")
        del saved["lm_head.weight"]  # the server's own head has it
        wanted = {f"model.{name}": value for name, value in self.backbone.state_dict().items()}
        assert saved.keys() == wanted.keys()
        for name, value in saved.items():
            wanted[name].copy_(value)

    def run(self, requests: list[Tensor], compiled: Any = None, hands_over: bool = True) -> Tensor:
        """Hidden states of all requests, one after the other."""
        lengths = [request.shape[1] for request in requests]
        self.batch = SimpleNamespace(owner=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)))
        handed = {"attention_instances": self.attention, "forward_batch": self.batch} if hands_over else {}
        return (self.backbone if compiled is None else compiled)(
            input_ids=torch.cat(requests, dim=1),
            inputs_embeds=None,
            position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
            use_cache=False,
            return_dict=False,
            **handed,
        )[0][0]


def make_requests(*lengths: int) -> list[Tensor]:
    return [random_ids(1, length, seed=length) for length in lengths]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One trained model that answers in each of the modes."""
    torch.manual_seed(0)
    model = trained(MoTForCausalLM(tiny_config()))
    folder = tmp_path_factory.mktemp("checkpoints")
    for mode in ("cross_example", *SERVED_MODES):
        model.set_mixing(inference_mixing=mode).save_pretrained(folder / mode)
    return {mode: folder / mode for mode in ("cross_example", *SERVED_MODES)}


@pytest.fixture
def backbone() -> MoTModel:
    return MoTModel(tiny_config())


@pytest.mark.parametrize("hands_over", [True, False])
@pytest.mark.parametrize("mode", SERVED_MODES)
@torch.no_grad()
def test_requests_of_a_server_get_what_they_get_alone(folders: dict[str, Path], mode: str, hands_over: bool) -> None:
    requests = make_requests(*LENGTHS)
    model = MoTForCausalLM.from_pretrained(folders[mode]).eval()
    alone = [model.model(request).last_hidden_state[0] for request in requests]
    served = Server(folders[mode]).run(requests, hands_over=hands_over)
    torch.testing.assert_close(served, torch.cat(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", SERVED_MODES)
@torch.no_grad()
def test_a_server_compiles_the_backbone_once_for_all_numbers_of_tokens(folders: dict[str, Path], mode: str) -> None:
    server = Server(folders[mode])
    with fresh_compiler():
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(server.backbone, backend=counter, fullgraph=True, dynamic=True)
        for lengths in (LENGTHS, (4, 9), (3, 2, 17, 6)):
            requests = make_requests(*lengths)
            torch.testing.assert_close(server.run(requests, compiled), server.run(requests), atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1


def test_the_checkpoint_says_what_a_server_loads(folders: dict[str, Path]) -> None:
    config = json.loads((folders["per_sequence"] / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_mot.MoTModel"
    assert config["architectures"] == ["MoTForCausalLM"]
    loaded = AutoConfig.from_pretrained(folders["per_sequence"])
    # The names by which servers tell that there are experts, and how many.
    assert {loaded.num_experts, loaded.num_local_experts} == {8}
    assert loaded.num_experts_per_tok == 2
    assert loaded.moe_intermediate_size == 32
    assert loaded.norm_topk_prob is True


def test_attention_is_the_servers(backbone: MoTModel) -> None:
    assert backbone._supports_attention_backend
    assert backbone.is_backend_compatible()


def test_a_misspelled_argument_is_refused_beside_the_servers(folders: dict[str, Path]) -> None:
    server = Server(folders["moe"])
    with pytest.raises(ValueError, match="no argument `positions_ids`"):
        server.backbone(
            input_ids=random_ids(1, 3), positions_ids=torch.arange(3)[None], attention_instances=server.attention
        )


def test_every_linear_layer_has_a_style_that_servers_know(backbone: MoTModel) -> None:
    plan = {name.replace(".", r"\.").replace(r"*", r"\d+"): style for name, style in backbone.tp_plan.items()}
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Linear):
            assert {style for rule, style in plan.items() if re.match(rule, name)} <= STYLES
            assert any(re.fullmatch(rule, name) for rule in plan), name
    assert set(plan.values()) <= STYLES | OTHER_STYLES


def test_attention_says_whether_it_is_causal(backbone: MoTModel) -> None:
    masked = MoTForMaskedLM(tiny_config()).model
    for model, is_causal in ((backbone, True), (masked, False)):
        assert {module.is_causal for module in model.modules() if hasattr(module, "is_causal")} == {is_causal}


def test_the_plan_of_a_pipeline_is_modules_around_one_list(backbone: MoTModel) -> None:
    modules = [backbone.get_submodule(name) for name in backbone.config.base_model_pp_plan or {}]
    assert [isinstance(module, nn.ModuleList) for module in modules] == [False, True, False]


def blocks_of(backbone: nn.Module) -> list[MoTSparseBlock]:
    return [module for module in backbone.modules() if isinstance(module, MoTSparseBlock)]


def test_experts_are_weights_in_three_dimensions_and_nothing_else(backbone: MoTModel) -> None:
    config: Any = backbone.config
    sizes = {
        "gate_up_proj": (config.num_experts, 2 * config.moe_intermediate_size, config.hidden_size),
        "down_proj": (config.num_experts, config.hidden_size, config.moe_intermediate_size),
    }
    for block in blocks_of(backbone):
        assert {name: tuple(weight.shape) for name, weight in block.experts.named_parameters()} == sizes
        assert block.experts.state_dict().keys() == sizes.keys()


@pytest.mark.parametrize("mode", SERVED_MODES)
@torch.no_grad()
def test_of_replaced_experts_nothing_is_used_but_their_forward(folders: dict[str, Path], mode: str) -> None:
    class Experts(ServedExperts):
        def __getattr__(self, name: str) -> Any:
            caller = inspect.stack()[1].filename
            assert not caller.endswith("_mot.py") or name == "base_layer", f"{caller} reads {name}"
            return super().__getattr__(name)

    server = Server(folders[mode])
    for block in blocks_of(server.backbone):
        block.experts.__class__ = Experts
    assert server.run(make_requests(*LENGTHS)).isfinite().all()


def test_a_servers_router_cannot_take_the_place_of_ours(backbone: MoTModel) -> None:
    # vLLM would replace a block of experts and a router that ends in topk(softmax(linear)), unless it has more state.
    block = blocks_of(backbone)[0]
    others = [child for name, child in block.named_children() if name not in ("gate", "experts")]
    assert any(child.state_dict() for child in others)
    logits = block.gate(torch.randn(1, 3, backbone.config.hidden_size))
    assert isinstance(logits, Tensor)
    assert logits.shape == (3, backbone.config.num_experts)


@pytest.mark.parametrize("mode", SERVED_MODES)
@torch.no_grad()
def test_statistics_stay_float32_in_a_server_of_bfloat16(folders: dict[str, Path], mode: str) -> None:
    server = Server(folders[mode], torch.bfloat16)
    saved = load_file(folders[mode] / "model.safetensors")
    buffers = {f"model.{name}": value for name, value in server.backbone.named_buffers() if "companions" in name}
    assert buffers
    for name, buffer in buffers.items():
        assert torch.equal(buffer, saved[name])
        assert buffer.dtype == saved[name].dtype != torch.bfloat16
    requests = make_requests(*LENGTHS)
    actual, expected = server.run(requests), Server(folders[mode]).run(requests)
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).norm() < 0.03 * expected.norm()


@torch.no_grad()
def test_a_server_is_refused_mode_cross_example(folders: dict[str, Path]) -> None:
    server = Server(folders["cross_example"])
    message = "mixing='cross_example' mixes different rows of the batch"
    # One request alone too, which could not be told from a row of a batch otherwise.
    for lengths in ((7,), LENGTHS):
        for hands_over in (True, False):
            with pytest.raises(ValueError, match=message):
                server.run(make_requests(*lengths), hands_over=hands_over)


def test_a_model_trained_to_mix_rows_is_served_in_mode_per_sequence() -> None:
    assert MoTConfig(mixing="cross_example").inference_mixing == "per_sequence"
    assert MoTConfig(mixing="moe").inference_mixing == "moe"


def test_a_server_is_refused_another_activation_than_its_own(tmp_path: Path) -> None:
    trained(MoTForCausalLM(tiny_config(hidden_act="gelu"))).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="run experts with SiLU, and those of this model have `hidden_act='gelu'`"):
        Server(tmp_path).run(make_requests(*LENGTHS))


def test_what_the_file_of_the_configuration_names_can_be_pickled() -> None:
    # vLLM hands the configuration of a checkpoint with code to its processes by value, with all that its file names.
    for name, value in vars(configuration_mot).items():
        if not name.startswith("__") and not isinstance(value, ModuleType):
            assert pickle.loads(pickle.dumps(value)) == value, name
