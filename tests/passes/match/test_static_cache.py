"""Attention over a StaticCache in Dynamo's graphs is matched by structure and rewritten; what looks alike is not."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from kvmix_compile.kernels.format.precision import Precision
from kvmix_compile.models_zoo.tiny import WINDOW, tiny
from kvmix_compile.passes.capture.dynamo import Lowered, lower
from kvmix_compile.passes.errors import UnsupportedModelError
from kvmix_compile.passes.graph.vocabulary import graph_inputs, operation
from kvmix_compile.passes.match.static_cache import CachedSite, find_cached_sites
from kvmix_compile.passes.rewrite.rewrite import STATE_TENSORS
from kvmix_compile.passes.rewrite.static import StaticRewritten, rewrite_static
from tests.helpers.cache_argument import with_cache
from tests.helpers.lowered import graphs_of
from tests.helpers.stored import stored_alike

SLOTS = 64
KEY, VALUE = Precision(3, 32, 4), Precision(2, 8, 16)


pytestmark = pytest.mark.usefixtures("dynamo_begins_anew")


def ids(tokens: int, rows: int = 2) -> Tensor:
    return torch.randint(3, 60, (rows, tokens), generator=torch.Generator().manual_seed(0))


def model_graphs(name: str, *chunks: int) -> list[tuple[Lowered, tuple[CachedSite, ...]]]:
    model = tiny(name)
    cache = StaticCache(model.config, max_cache_len=SLOTS)
    calls = [((), {"input_ids": ids(chunk), **with_cache(cache)}) for chunk in chunks]
    return [(graph, find_cached_sites(graph)) for graph in graphs_of(model, calls)]


def rewritten(graph: Lowered, sites: tuple[CachedSite, ...]) -> StaticRewritten:
    return rewrite_static(graph, sites, stored_alike([cached.site for cached in sites], KEY, VALUE))


def operations(graph: Lowered) -> list[str]:
    return [operation(node) for node in graph.graph.nodes]


# Of each architecture: query heads, KV heads, and the forms of its two layers with a prompt of 30 and one more token.
FORMS = {
    "llama": (4, 2, ["indexed", "indexed"], ["indexed", "indexed"]),
    "gpt2": (4, 4, ["indexed", "indexed"], ["indexed", "indexed"]),
    "falcon": (4, 1, ["indexed", "indexed"], ["indexed", "indexed"]),
    "mistral": (4, 2, ["fresh", "fresh"], ["rolled", "rolled"]),
    "gemma2": (4, 2, ["fresh", "indexed"], ["rolled", "indexed"]),
    "gemma3": (4, 2, ["fresh", "indexed"], ["rolled", "indexed"]),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_layer_is_matched_and_rewritten_when_prompting_and_when_decoding(name: str) -> None:
    query_heads, kv_heads, *forms = FORMS[name]
    for (graph, sites), expected in zip(model_graphs(name, 30, 1), forms, strict=True):
        assert [cached.key.form for cached in sites] == expected
        for cached in sites:
            site = cached.site
            assert (site.query_heads, site.kv_heads, site.key_dim, site.value_dim) == (query_heads, kv_heads, 32, 32)
            assert site.mask.size == (0 if cached.key.form == "indexed" else WINDOW)
            assert site.score_function.scale == pytest.approx(32**-0.5, rel=1e-5)
            assert site.score_function.softcap == pytest.approx(4.0 if name == "gemma2" else 0.0)
            assert cached.key.new is site.key and cached.value.new is site.value
        check_rewriting(graph, sites)


def check_rewriting(graph: Lowered, sites: tuple[CachedSite, ...]) -> None:
    """Attention, masks and buffers are gone."""
    before, inputs, outputs = operations(graph), graph_inputs(graph.graph), output_of(graph)
    assert {"scaled_dot_product_attention", "softmax"} & set(before)
    buffers = {buffer.tensor for cached in sites for buffer in (cached.key, cached.value)}
    after = rewritten(graph, sites)
    found = operations(graph)
    gone = {"scaled_dot_product_attention", "softmax", "index_copy_", "index_put_", "copy_", "roll", "le", "zeros"}
    assert not gone & set(found)
    assert found.count("attend") == found.count("append") == len(sites) == 2
    assert not buffers & set(graph_inputs(graph.graph))
    assert [inputs[place] for place in after.kept] == graph_inputs(graph.graph)[: len(after.kept)]
    made = [place for place, node in enumerate(outputs) if node in [buffer.written for buffer in made_in(sites)]]
    assert sorted(after.buffers) == made and len(made) in (0, 4)
    assert [output_of(graph)[place] for place in made] == [None] * len(made)


def test_layers_have_the_names_of_their_modules() -> None:
    modules = dict(tiny("llama").named_modules())
    ((_, sites),) = model_graphs("llama", 5)
    assert len({cached.site.layer for cached in sites} & modules.keys()) == 2


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_a_window_is_joined_with_a_chunk(name: str) -> None:
    sites = model_graphs(name, 20, 10)[-1][1]
    assert sites[0].key.form == "joined" and sites[0].key.holds_all


def made_in(sites: tuple[CachedSite, ...]) -> list[Any]:
    return [buffer for cached in sites for buffer in (cached.key, cached.value) if not buffer.is_input]


def output_of(graph: Lowered) -> list[Any]:
    return list(next(node for node in graph.graph.nodes if node.op == "output").args[0])


def test_new_tokens_are_appended_after_they_were_attended_to() -> None:
    graph, sites = model_graphs("gemma2", 30, 1)[1]
    rewritten(graph, sites)
    names = [node.name for node in graph_inputs(graph.graph)][-14:]
    assert names == ["lengths", "starts", *(f"{tensor}_{index}" for index in range(2) for tensor in STATE_TENSORS)]
    order = [node for node in graph.graph.nodes if operation(node) in ("attend", "append")]
    assert [operation(node) for node in order] == ["attend", "append"] * 2
    for attend, append in zip(order[::2], order[1::2], strict=True):
        assert attend.args[1:14] == append.args[:13]
    assert [attend.args[14:] for attend in order[::2]] == [
        (pytest.approx(32**-0.5, rel=1e-5), pytest.approx(4.0), window) for window in (WINDOW, 0)
    ]


def test_the_count_of_tokens_goes_on() -> None:
    graph, sites = model_graphs("llama", 5, 1)[1]
    rewritten(graph, sites)
    assert operations(graph).count("add") > 2
    assert sum(node.target is torch.ops.aten.add_.Tensor for node in graph.graph.nodes) == 2


def test_a_prompt_of_another_length_and_another_batch_have_the_same_symbols() -> None:
    model = tiny("llama")
    calls = [
        ((), {"input_ids": ids(tokens, rows), **with_cache(StaticCache(model.config, max_cache_len=SLOTS))})
        for rows, tokens in ((2, 10), (3, 17))
    ]
    graph = graphs_of(model, calls)[-1]
    batch, _, tokens, _ = find_cached_sites(graph)[0].site.key.meta["val"].shape
    assert isinstance(batch, torch.SymInt) and isinstance(tokens, torch.SymInt)
    assert any(fake is batch or getattr(fake, "shape", ())[:2] == (batch, tokens) for fake in graph.fakes)


# What is no attention over a cache, and what cannot be replaced. One layer, attention as the test writes it.

Attend = Callable[[Tensor, Tensor, Tensor, StaticLayer], Any]
HEADS, HEAD_DIM = 4, 8


class CachedToy(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        width = HEADS * HEAD_DIM
        self.attend = attend
        self.embedding = nn.Embedding(64, width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.router = nn.Linear(width, SLOTS)

    def forward(self, input_ids: Tensor, layer: StaticLayer) -> Any:
        hidden = self.embedding(input_ids)
        query, key, value = (
            projection(hidden).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        return self.attend(query, key, value, layer), torch.softmax(self.router(hidden), -1)


def toy_graph(attend: Attend) -> Lowered:
    """The graph of a second call: a chunk of 3 tokens after 5."""
    layer = StaticLayer(max_cache_len=SLOTS)
    return graphs_of(CachedToy(attend).eval(), [((ids(5), layer), {}), ((ids(3), layer), {})])[-1]


def causal(query: Tensor, layer: StaticLayer) -> Tensor:
    """Boolean `[tokens, slots]`; to be called after the layer's update, which counts the new tokens."""
    tokens = query.shape[2]
    position = torch.arange(tokens) + layer.cumulative_length - tokens
    return torch.arange(SLOTS) <= position[:, None]


def fused(query: Tensor, key: Tensor, value: Tensor, layer: StaticLayer) -> Tensor:
    length = layer.cumulative_length.clone()
    position = torch.arange(query.shape[2]) + length
    mask = torch.arange(SLOTS) <= position[:, None]
    keys, values = layer.update(key, value)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)


def scores_and_values(query: Tensor, key: Tensor, value: Tensor, layer: StaticLayer) -> tuple[Tensor, Tensor, Tensor]:
    """Masked scores, values, and the distance of each slot from each token."""
    distance = torch.arange(SLOTS) - (torch.arange(query.shape[2]) + layer.cumulative_length)[:, None]
    keys, values = layer.update(key, value)
    scores = query @ keys.transpose(-1, -2) / math.sqrt(HEAD_DIM)
    return scores.masked_fill(distance > 0, -math.inf), values, distance


def spelled_out(query: Tensor, key: Tensor, value: Tensor, layer: StaticLayer) -> Tensor:
    scores, values, _ = scores_and_values(query, key, value, layer)
    return torch.softmax(scores, -1) @ values


@pytest.mark.parametrize("attend", [fused, spelled_out])
def test_attention_is_found_and_another_softmax_is_not(attend: Attend) -> None:
    graph = toy_graph(attend)
    (cached,) = find_cached_sites(graph)
    assert cached.site.score_function.scale == pytest.approx(HEAD_DIM**-0.5)
    rewritten(graph, (cached,))
    assert operations(graph).count("softmax") == 1


def test_attention_to_something_else_is_left_alone() -> None:
    encoded = torch.randn(2, HEADS, 7, HEAD_DIM)

    def attend(query, key, value, layer):
        return fused(query, key, value, layer), F.scaled_dot_product_attention(query, encoded, encoded)

    graph = toy_graph(attend)
    sites = find_cached_sites(graph)
    assert len(sites) == 1
    rewritten(graph, sites)
    assert operations(graph).count("scaled_dot_product_attention") == 1


def test_what_two_attentions_read_is_stored_once() -> None:
    def attend(query, key, value, layer):
        length = layer.cumulative_length.clone()
        mask = torch.arange(SLOTS) <= (torch.arange(query.shape[2]) + length)[:, None]
        keys, values = layer.update(key, value)
        first = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        return F.scaled_dot_product_attention(query + first, keys, values, attn_mask=mask)

    graph = toy_graph(attend)
    (cached,) = find_cached_sites(graph)
    assert len(cached.site.readers) == 1
    rewritten(graph, (cached,))
    assert [name for name in operations(graph) if name in ("attend", "append")] == ["attend", "attend", "append"]


def test_by_another_mask_it_is_stored_again() -> None:
    def attend(query, key, value, layer):
        length = layer.cumulative_length.clone()
        position = (torch.arange(query.shape[2]) + length)[:, None]
        keys, values = layer.update(key, value)
        first = F.scaled_dot_product_attention(query, keys, values, attn_mask=torch.arange(SLOTS) <= position)
        other = torch.arange(SLOTS) < position + 1
        return F.scaled_dot_product_attention(query + first, keys, values, attn_mask=other)

    assert [cached.site.readers for cached in find_cached_sites(toy_graph(attend))] == [(), ()]


def without_mask(query, key, value, layer):
    return F.scaled_dot_product_attention(query, *layer.update(key, value))


def with_bias(query, key, value, layer):
    scores, values, distance = scores_and_values(query, key, value, layer)
    return torch.softmax(scores + 0.1 * distance, -1) @ values


def with_dropout(query, key, value, layer):
    return F.scaled_dot_product_attention(query, *layer.update(key, value), causal(query, layer), dropout_p=0.1)


def with_spelled_out_dropout(query, key, value, layer):
    scores, values, _ = scores_and_values(query, key, value, layer)
    return F.dropout(torch.softmax(scores, -1), 0.1, training=True) @ values


def returning_probabilities(query, key, value, layer):
    scores, values, _ = scores_and_values(query, key, value, layer)
    probabilities = torch.softmax(scores, -1)
    return probabilities @ values, probabilities


def with_other_heads(query, key, value, layer):
    keys, values = layer.update(key, value)
    return F.scaled_dot_product_attention(query, keys.flip(1), values, causal(query, layer))


def with_swapped_heads(query, key, value, layer):
    keys, values = layer.update(key, value)
    return F.scaled_dot_product_attention(query, keys[:, [1, 0, 2, 3]], values, causal(query, layer))


def with_keys_alone(query, key, value, layer):
    keys, _ = layer.update(key, value)
    return F.scaled_dot_product_attention(query, keys, torch.ones_like(keys), causal(query, layer))


def with_latents(query, key, value, layer):
    keys, values = layer.update(key, value)
    keys, values = torch.sin(keys), torch.sin(values)
    return F.scaled_dot_product_attention(query, keys, values, causal(query, layer))


def with_learned_scale(query, key, value, layer):
    scores, values, _ = scores_and_values(query, key, value, layer)
    return torch.softmax(scores.sin(), -1) @ values


def with_rows_of_heads(query, key, value, layer):
    """Batch and heads are one dimension where queries and keys are multiplied, and two where the mask is added."""
    mask = torch.arange(SLOTS) > (torch.arange(query.shape[2]) + layer.cumulative_length)[:, None]
    keys, values = layer.update(key, value)
    scores = torch.bmm(query.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2)) / math.sqrt(HEAD_DIM)
    scores = scores.view(-1, HEADS, query.shape[2], SLOTS).masked_fill(mask, -math.inf)
    return torch.softmax(scores, -1) @ values


REFUSED = {
    without_mask: "no mask",
    with_bias: "adds a bias",
    with_dropout: "dropout is active",
    with_spelled_out_dropout: "dropout is active",
    returning_probabilities: "used elsewhere",
    with_other_heads: "only the values",
    with_swapped_heads: "changed before it is attended to",
    with_keys_alone: "only the keys",
    with_latents: "worked on before it is attended to",
    with_learned_scale: "not a scale, a soft cap and a mask",
    with_rows_of_heads: "queries have the shape",
}


@pytest.mark.parametrize("attend", REFUSED, ids=lambda attend: attend.__name__)
def test_attention_over_a_cache_that_cannot_be_replaced_is_refused_by_name(attend: Attend) -> None:
    with pytest.raises(UnsupportedModelError, match=REFUSED[attend]):
        find_cached_sites(toy_graph(attend))


class BackwardWindow(StaticSlidingWindowLayer):
    """Puts the new tokens in front of the old ones."""

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key, value)
            return key, value
        keys, values = torch.cat([self.keys[:, :, 1:], key], 2), torch.cat([self.values[:, :, 1:], value], 2)
        self.keys.copy_(keys[:, :, : self.max_cache_len])
        self.values.copy_(values[:, :, : self.max_cache_len])
        return keys, values


def test_a_window_that_does_not_end_with_the_new_tokens_is_refused() -> None:
    def attend(query, key, value, layer):
        keys, values = layer.update(key, value)
        return F.scaled_dot_product_attention(query, keys, values, torch.ones(query.shape[2], keys.shape[2]) > 0)

    layer = BackwardWindow(max_cache_len=SLOTS, sliding_window=8)
    graph = graphs_of(CachedToy(attend).eval(), [((ids(5), layer), {}), ((ids(3), layer), {})])[-1]
    with pytest.raises(UnsupportedModelError, match="not a window that ends with the new tokens"):
        find_cached_sites(graph)


def test_a_cache_that_is_read_elsewhere_too_is_refused() -> None:
    def attend(query, key, value, layer):
        return fused(query, key, value, layer), layer.keys.sum()

    graph = toy_graph(attend)
    with pytest.raises(UnsupportedModelError, match="also read by sum"):
        rewritten(graph, find_cached_sites(graph))


def test_a_cache_that_grows_is_refused_with_what_to_use_instead() -> None:
    model, cache = tiny("llama"), DynamicCache()
    calls = [((), {"input_ids": ids(tokens), **with_cache(cache)}) for tokens in (5, 1)]
    for graph in graphs_of(model, calls):
        with pytest.raises(UnsupportedModelError, match="model.layers.0.self_attn.*cache_implementation='static'"):
            find_cached_sites(graph)


def test_without_a_cache_there_are_no_sites() -> None:
    graphs = graphs_of(tiny("llama"), [((), {"input_ids": ids(5), "use_cache": False})])
    assert [find_cached_sites(graph) for graph in graphs] == [()]


def test_lowering_leaves_dynamos_graph_alone() -> None:
    seen = []

    def backend(module, inputs):
        before = str(module.graph)
        lower(module, inputs)
        seen.append(str(module.graph) == before)
        return module.forward

    with torch.no_grad():
        torch.compile(lambda x: x.relu() + 1, backend=backend)(torch.randn(3))
    assert seen == [True]
