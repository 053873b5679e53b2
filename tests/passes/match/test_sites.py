"""Find sites: attention is matched however it is spelled, and what only looks like it is not."""

import math
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvmix_compile.models_zoo.tiny import TINY, WINDOW, tiny
from kvmix_compile.passes.capture.export import capture
from kvmix_compile.passes.graph.vocabulary import operation, tensor_of
from kvmix_compile.passes.match.masks import Mask
from kvmix_compile.passes.match.sites import find_sites

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
CAUSAL, SLIDING = Mask("causal"), Mask("sliding", WINDOW)
# Of each architecture of the zoo: query heads, KV heads, head_dim, and the masks of its two layers.
SHAPES: dict[str, tuple[int, int, int, list[Mask]]] = {
    "llama": (4, 2, 32, [CAUSAL, CAUSAL]),
    "mistral": (4, 2, 32, [SLIDING, SLIDING]),
    "qwen2": (4, 2, 32, [CAUSAL, CAUSAL]),
    "qwen3": (4, 2, 32, [CAUSAL, CAUSAL]),
    "gemma2": (4, 2, 32, [SLIDING, CAUSAL]),
    "gemma3": (4, 2, 32, [SLIDING, CAUSAL]),
    "phi3": (4, 2, 32, [CAUSAL, CAUSAL]),
    "gpt2": (4, 4, 32, [CAUSAL, CAUSAL]),
    "opt": (8, 8, 16, [CAUSAL, CAUSAL]),
    "gpt_neox": (4, 4, 32, [CAUSAL, CAUSAL]),
    "falcon": (4, 1, 32, [CAUSAL, CAUSAL]),
    "mixtral": (4, 2, 32, [CAUSAL, CAUSAL]),
    "hand_written": (4, 2, 16, [CAUSAL, CAUSAL]),
    "fused_arange": (4, 4, 16, [CAUSAL, CAUSAL]),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_layer_of_every_architecture_is_found(captured, name: str) -> None:
    assert set(SHAPES) >= set(TINY)
    query_heads, kv_heads, head_dim, masks = SHAPES[name]
    sites = find_sites(captured(name))
    assert sites.refused == ()
    assert [site.mask for site in sites.matched] == masks
    for index, site in enumerate(sites.matched):
        assert f".{index}." in f".{site.layer}."
        assert (site.query_heads, site.kv_heads) == (query_heads, kv_heads)
        assert (site.key_dim, site.value_dim) == (head_dim, head_dim)
        assert site.score_function.softcap == (4.0 if name == "gemma2" else 0.0)
        # What queries are multiplied with by the time they meet the keys differs; most scale by the head's size.
        assert site.score_function.scale == pytest.approx(1.0 if name == "opt" else head_dim**-0.5, rel=1e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_heads_are_taken_before_they_are_repeated(captured, name: str) -> None:
    graph = captured(name)
    for site in find_sites(graph).matched:
        for node, heads in ((site.query, site.query_heads), (site.key, site.kv_heads), (site.value, site.kv_heads)):
            value = tensor_of(node)
            assert value is not None and value.dim() == 4 and value.shape[1] == heads
        assert len({site.query, site.key, site.value, site.output}) == 4


def test_layers_have_the_names_of_their_modules(captured) -> None:
    for name in ("llama", "gpt2", "hand_written"):
        modules = dict(captured(name).model.named_modules())
        assert all(site.layer in modules for site in find_sites(captured(name)).matched)


# Spellings


def causal(states: Tensor) -> Tensor:
    """Boolean `[tokens, tokens]` for scores or states `[.., tokens, anything]`."""
    tokens = states.shape[2]
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


def masked(scores: Tensor) -> Tensor:
    return scores.masked_fill(~causal(scores), -math.inf)


def spelled_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    return torch.softmax(masked(scores), -1) @ value


def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def repeat_interleave(attend: Attend) -> Attend:
    return lambda q, k, v: attend(q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1))


def expanded(heads: Tensor) -> Tensor:
    batch, count, tokens, dim = heads.shape
    return heads[:, :, None].expand(batch, count, 2, tokens, dim).reshape(batch, 2 * count, tokens, dim)


def stacked(heads: Tensor) -> Tensor:
    return torch.stack((heads, heads), dim=2).flatten(1, 2)


def index_selected(heads: Tensor) -> Tensor:
    return heads[:, torch.tensor([0, 0, 1, 1])]


GROUPED: dict[str, Attend] = {
    "repeat_interleave, spelled out": repeat_interleave(spelled_out),
    "repeat_interleave, fused": repeat_interleave(fused),
    "expand, spelled out": lambda q, k, v: spelled_out(q, expanded(k), expanded(v)),
    "expand, fused": lambda q, k, v: fused(q, expanded(k), expanded(v)),
    "index": lambda q, k, v: fused(q, index_selected(k), index_selected(v)),
    "enable_gqa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
}


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_queries_keep_the_heads_that_are_projected(capture_toy, name: str) -> None:
    (site,) = find_sites(capture_toy(GROUPED[name], heads=4, kv_heads=2)).matched
    assert (site.query_heads, site.kv_heads) == (4, 2)
    assert operation(site.key) in ("transpose", "permute") and operation(site.value) in ("transpose", "permute")


def test_heads_repeated_in_another_order_are_kept_repeated_or_refused(capture_toy) -> None:
    """`repeat` gives heads 0 1 0 1, which a cache of two heads would attend to as 0 0 1 1."""
    sites = find_sites(capture_toy(lambda q, k, v: fused(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)), kv_heads=2))
    assert [site.kv_heads for site in sites.matched] == [4] or sites.refused


ONE_HEAD_EACH: dict[str, Attend] = {
    "fused": fused,
    "spelled out": spelled_out,
    "fused with a mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=causal(q)),
    "softmax of float32": lambda q, k, v: (
        torch.softmax(masked(q @ k.transpose(2, 3)), -1, dtype=torch.float32).to(v.dtype) @ v
    ),
    "inactive dropout": lambda q, k, v: (
        F.dropout(torch.softmax(masked(q @ k.transpose(2, 3)), -1), 0.5, training=False) @ v
    ),
    "scaled queries": lambda q, k, v: spelled_out(q * 0.5, k, v),
    "mT": lambda q, k, v: torch.softmax(masked(q @ k.mT), -1) @ v,
    "permuted keys": lambda q, k, v: torch.softmax(masked(q @ k.permute(0, 1, 3, 2)), -1) @ v,
}


@pytest.mark.parametrize("name", ONE_HEAD_EACH)
def test_spellings_of_attention(capture_toy, name: str) -> None:
    sites = find_sites(capture_toy(ONE_HEAD_EACH[name]))
    assert sites.refused == ()
    (site,) = sites.matched
    assert (site.query_heads, site.kv_heads, site.mask) == (4, 4, CAUSAL)


def test_two_attentions_in_one_module_have_different_names(capture_toy) -> None:
    sites = find_sites(capture_toy(lambda q, k, v: fused(q, k, v) + fused(q, k, 2 * v)))
    assert len({site.layer for site in sites.matched}) == 2


# What is refused, and why


def with_active_dropout(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.dropout(torch.softmax(masked(query @ key.transpose(2, 3)), -1), 0.1, training=True) @ value


def weights_used_twice(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    weights = torch.softmax(masked(query @ key.transpose(2, 3)), -1)
    return weights @ value + weights.sum(-1, keepdim=True)


def content_mask(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    allowed = causal(query) & (key[:, :, None, :, 0] < 5)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)


def content_bias(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.softmax(masked(query @ key.transpose(2, 3) + key[:, :, None, :, 0]), -1) @ value


def relative_bias(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    tokens = torch.arange(query.shape[2])
    bias = (tokens - tokens[:, None]).abs().float().sqrt().masked_fill(~causal(query), -math.inf)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def of_a_memory(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Cross-attention: keys and values are not of the text at all."""
    memory = torch.linspace(-1, 1, 7 * 8).reshape(1, 1, 7, 8).expand(query.shape[0], 4, 7, 8)
    return torch.softmax(query @ memory.transpose(2, 3), -1) @ memory + F.scaled_dot_product_attention(
        query, memory, memory
    )


def weights_also_given_on(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention whose probabilities leave the layer, and change what comes after."""
    weights = torch.softmax(masked(query @ key.transpose(2, 3)), -1)
    return weights @ value + (weights @ torch.ones_like(weights))[..., :1]


def pooled_keys(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Keys of another length than the text, as cross-attention has them."""
    return F.scaled_dot_product_attention(query, key[:, :, :5], value[:, :, :5])


REFUSED: dict[str, tuple[Attend, str]] = {
    "no mask, fused": (F.scaled_dot_product_attention, "no mask"),
    "no mask, spelled out": (lambda q, k, v: torch.softmax(q @ k.transpose(2, 3), -1) @ v, "not causal"),
    "dropout, fused": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.1, True), r"eval\(\)"),
    "dropout, spelled out": (with_active_dropout, r"eval\(\)"),
    "weights used twice": (weights_used_twice, "elsewhere"),
    "mask of the content": (content_mask, "depends on the tokens"),
    "bias of the content": (content_bias, "query-key products alone"),
    "relative bias": (relative_bias, "bias"),
    "cross-attention": (of_a_memory, "no mask"),
    "probabilities given on": (weights_also_given_on, "elsewhere"),
    "keys of another length": (pooled_keys, "."),
    "thresholded weights": (
        lambda q, k, v: torch.softmax(masked(q @ k.transpose(2, 3)), -1).clamp(min=0.1) @ v,
        "clamp",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cached_is_refused_with_a_reason(capture_toy, name: str) -> None:
    attend, reason = REFUSED[name]
    sites = find_sites(capture_toy(attend))
    assert sites.matched == ()
    (refusal,) = sites.refused
    assert re.search(reason, refusal.reason)


def test_heads_that_are_one_dimension_with_rows_are_told_apart(captured) -> None:
    """BLOOM multiplies `[batch * heads, tokens, head_dim]`."""
    for site in find_sites(captured("bloom")).matched:
        assert (site.query_heads, site.kv_heads, site.key_dim, site.value_dim) == (4, 4, 32, 32)
        for node in (site.query, site.key, site.value, site.output):
            value = tensor_of(node)
            assert value is not None and value.dim() == 4


class GivingWeights(nn.Module):
    """Returns the probabilities of its attention beside its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        states = self.embedding(input_ids).unflatten(-1, (2, 8)).transpose(1, 2)
        weights = torch.softmax(masked(states @ states.transpose(2, 3)), -1)
        return self.head((weights @ states).transpose(1, 2).flatten(2)), weights


def test_probabilities_that_are_only_returned_are_given_up() -> None:
    sites = find_sites(capture(GivingWeights().eval()))
    assert len(sites.matched) == 1 and not sites.refused


def test_an_encoder_is_refused() -> None:
    sites = find_sites(capture(tiny("bert")))
    assert not sites.matched and "encoder" in sites.refused[0].reason


class Router(nn.Module):
    """Softmaxes that are not attention: over experts, over features, and over the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.router = nn.Linear(16, 4)
        self.head = nn.Linear(16, 32)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        routed = torch.softmax(self.router(hidden), -1).sum(-1, keepdim=True)
        return torch.log_softmax(self.head(torch.softmax(hidden, -1) * routed), -1).softmax(-1)


def test_softmax_that_is_not_over_tokens_is_no_attention() -> None:
    sites = find_sites(capture(Router().eval()))
    assert sites.matched == () and sites.refused == ()


def test_the_router_of_a_mixture_of_experts_is_no_attention(captured) -> None:
    softmaxes = [node for node in captured("mixtral").graph.nodes if operation(node) == "softmax"]
    sites = find_sites(captured("mixtral"))
    assert softmaxes and len(sites.matched) == 2 and not sites.refused
