"""Projections: the weights that keys and values come from, separate or fused."""

import pytest
import torch
from torch import Tensor, nn

from kvmix_compile.passes.capture.export import capture
from kvmix_compile.passes.graph.dataflow import Dataflow
from kvmix_compile.passes.graph.vocabulary import operation, tensor_of
from kvmix_compile.passes.match.projections import find_projection
from kvmix_compile.passes.match.sites import find_sites

SEPARATE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "opt", "mixtral", "hand_written")
FUSED = {
    "phi3": "qkv_proj",
    "gpt2": "c_attn",
    "gpt_neox": "query_key_value",
    "falcon": "query_key_value",
    "fused_arange": "qkv",
}


def weights_behind(captured, node) -> tuple[str, list[str]]:
    """The operation of the projection, and the parameters that it reads."""
    projection = find_projection(node, Dataflow(captured.graph))
    assert projection is not None
    sources = [source for source in projection.output.all_input_nodes if source is not projection.input]
    # Falcon multiplies by the transpose of its weights.
    sources = [
        source.all_input_nodes[0] if operation(source) in ("t", "transpose", "permute", "numpy_T") else source
        for source in sources
    ]
    return operation(projection.output), [source.target for source in sources]


@pytest.mark.parametrize("name", SEPARATE)
def test_keys_and_values_have_projections_of_their_own(captured, name: str) -> None:
    for site in find_sites(captured(name)).matched:
        for node, names in ((site.key, ("k_proj", "key")), (site.value, ("v_proj", "value"))):
            kind, parameters = weights_behind(captured(name), node)
            assert kind == "linear"
            assert any(f"{site.layer}.{name}.weight" in parameter for parameter in parameters for name in names)


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_projection_is_that_of_keys_and_of_values(captured, name: str) -> None:
    dataflow = Dataflow(captured(name).graph)
    for site in find_sites(captured(name)).matched:
        key, value = find_projection(site.key, dataflow), find_projection(site.value, dataflow)
        assert key is not None and key == value
        kind, parameters = weights_behind(captured(name), site.key)
        assert kind == {"gpt2": "addmm", "falcon": "matmul"}.get(name, "linear")
        assert any(f"{site.layer}.{FUSED[name]}.weight" in parameter for parameter in parameters)


def test_a_projection_maps_features_to_features(captured) -> None:
    site = find_sites(captured("llama")).matched[0]
    projection = find_projection(site.key, Dataflow(captured("llama").graph))
    assert projection is not None
    given, made = tensor_of(projection.input), tensor_of(projection.output)
    assert given is not None and made is not None
    assert given.shape[-1] == 128 and made.shape[-1] == site.kv_heads * site.key_dim


class TwoMaps(nn.Module):
    """Keys made of two projections; values of none."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 32)
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        key = self.first(hidden) + self.second(hidden.sin())
        query, key, value = (states.unflatten(-1, (4, 8)).transpose(1, 2) for states in (hidden, key, hidden))
        return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)


def test_what_has_not_exactly_one_projection_has_none() -> None:
    captured = capture(TwoMaps().eval())
    (site,) = find_sites(captured).matched
    dataflow = Dataflow(captured.graph)
    assert find_projection(site.key, dataflow) is None
    assert find_projection(site.value, dataflow) is None


class Adapted(TwoMaps):
    """Keys by a linear map and a low-rank adapter of it."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(32, 4), nn.Linear(4, 32)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        key = self.first(hidden) + 2 * self.up(self.down(hidden))
        states = key.unflatten(-1, (4, 8)).transpose(1, 2)
        return (
            nn.functional.scaled_dot_product_attention(states, states, states, is_causal=True)
            .transpose(1, 2)
            .flatten(2)
        )


def test_a_map_with_an_adapter_is_the_one_that_is_adapted() -> None:
    captured = capture(Adapted().eval())
    (site,) = find_sites(captured).matched
    kind, parameters = weights_behind(captured, site.key)
    assert kind == "linear" and "model.first.weight" in parameters


def test_a_low_rank_projection_is_the_one_next_to_the_cache() -> None:
    """As in multi-head latent attention: the keys come from the second of two maps."""

    class LowRank(TwoMaps):
        def forward(self, input_ids: Tensor) -> Tensor:
            hidden = self.embedding(input_ids)
            states = self.second(self.first(hidden)).unflatten(-1, (4, 8)).transpose(1, 2)
            mixed = nn.functional.scaled_dot_product_attention(states, states, states, is_causal=True)
            return mixed.transpose(1, 2).flatten(2)

    captured = capture(LowRank().eval())
    (site,) = find_sites(captured).matched
    projection = find_projection(site.key, Dataflow(captured.graph))
    assert projection is not None
    assert "model.second.weight" in [source.target for source in projection.output.all_input_nodes]
    assert torch.equal(captured.model.second.weight, captured.module.get_parameter("model.second.weight"))
