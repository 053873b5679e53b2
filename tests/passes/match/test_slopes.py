"""ALiBi: a bias that is linear in the distance of two tokens, wherever a model adds it."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvmix_compile.passes.errors import UnsupportedModelError
from kvmix_compile.passes.graph.vocabulary import as_node, operation
from kvmix_compile.passes.match.masks import Mask
from kvmix_compile.passes.match.sites import find_sites
from kvmix_compile.passes.match.slopes import slopes_of
from kvmix_compile.passes.rewrite.rewrite import rewrite
from kvmix_compile.passes.rewrite.verify import verify
from tests.helpers.stored import stored_alike

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
SLOPES = (0.5, 0.3, 0.125, -0.25)


def distances(tokens: int) -> Tensor:
    """Of each token (row) to each other, negative for those before it."""
    token = torch.arange(tokens)
    return token - token[:, None]


CAUSAL = distances(40) <= 0


@given(
    st.lists(st.floats(-2, 2, width=32).filter(lambda slope: abs(slope) > 1e-3), min_size=1, max_size=4),
    st.floats(-50, 50, width=32),
    st.sampled_from([CAUSAL, CAUSAL & (distances(40) > -7), CAUSAL[20:]]),
)
def test_slopes_are_found_whatever_is_added_to_each_query(slopes: list[float], added: float, allowed: Tensor) -> None:
    bias = torch.tensor(slopes)[:, None, None] * distances(40)[-len(allowed) :] + added * torch.randn(len(allowed), 1)
    found = slopes_of(bias.masked_fill(~allowed, -math.inf), allowed, "layer")
    assert found == pytest.approx(slopes, rel=1e-3, abs=1e-5)


def test_slopes_of_a_bias_computed_in_bfloat16() -> None:
    bias = (torch.tensor(SLOPES).bfloat16()[:, None, None] * torch.arange(40)).expand(-1, 40, -1)
    assert slopes_of(bias, CAUSAL, "layer") == pytest.approx(SLOPES, rel=5e-3)


def test_no_bias_has_no_slopes() -> None:
    assert slopes_of(torch.zeros(4, 40, 40).masked_fill(~CAUSAL, -1e9), CAUSAL, "layer") == ()


BIASES: dict[str, Tensor] = {
    "quadratic": distances(40).float().square().neg(),
    "logarithmic": -distances(40).abs().add(1).log(),
    "clipped": distances(40).clamp(min=-20).float(),
    "random": torch.randn(40, 40, generator=torch.Generator().manual_seed(0)),
    "of keys alone": torch.randn(40, generator=torch.Generator().manual_seed(0)).expand(40, 40),
    "another slope later": torch.where(torch.arange(40)[:, None] < 20, 1.0, 2.0) * distances(40),
    "not a number": torch.full((40, 40), math.nan),
}


@pytest.mark.parametrize("name", BIASES)
def test_other_biases_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"layers\.3: it adds a bias"):
        slopes_of(BIASES[name], CAUSAL, "layers.3")


# In graphs


def alibi(query: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(SLOPES, dtype=dtype)[:, None, None] * torch.arange(query.shape[2])


def additive_mask(query: Tensor) -> Tensor:
    tokens = query.shape[2]
    return torch.full((tokens, tokens), torch.finfo(query.dtype).min).triu(1)


def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    mask = (alibi(query) + additive_mask(query))[None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.25)


def spelled_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.transpose(2, 3) * 0.25 + alibi(query)
    return (scores + additive_mask(query)).softmax(-1) @ value


def before_the_scale(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = (query @ key.transpose(2, 3) + 4 * alibi(query)) * 0.25
    return (scores + additive_mask(query)).softmax(-1) @ value


def after_a_soft_cap(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = 3 * torch.tanh(query @ key.transpose(2, 3) * 0.25 / 3) + alibi(query)
    return (scores + additive_mask(query)).softmax(-1) @ value


def of_distances(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    token = torch.arange(query.shape[2])
    bias = torch.tensor(SLOPES)[:, None, None] * (token - token[:, None])
    scores = query @ key.transpose(2, 3) * 0.25 + bias
    return scores.masked_fill(token > token[:, None], -math.inf).softmax(-1) @ value


def within_the_product(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    batch, heads, tokens, dim = query.shape
    flat_query, flat_value = (part.reshape(batch * heads, -1, dim) for part in (query, value))
    flat_key = key.reshape(batch * heads, -1, dim).transpose(-1, -2)
    bias = alibi(query)[:, :1].repeat(batch, 1, 1)
    scores = bias.baddbmm(flat_query, flat_key, beta=2.0, alpha=0.25).view(batch, heads, tokens, -1)
    weights = (scores - alibi(query)[:, :1] + additive_mask(query)).softmax(-1).view(batch * heads, tokens, -1)
    return torch.bmm(weights, flat_value).view(batch, heads, tokens, dim)


SPELLINGS: dict[str, Attend] = {
    "fused": fused,
    "spelled out": spelled_out,
    "before the scale": before_the_scale,
    "after a soft cap": after_a_soft_cap,
    "of distances": of_distances,
    "within the product": within_the_product,
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_it_is_recognised_and_verified(capture_toy, name: str) -> None:
    captured = capture_toy(SPELLINGS[name])
    sites = find_sites(captured)
    assert not sites.refused
    (site,) = sites.matched
    function = site.score_function
    assert function.mask == Mask("causal") and function.scale == pytest.approx(0.25, rel=1e-4)
    assert function.slopes == pytest.approx(SLOPES, rel=1e-4)
    assert verify(captured, sites.matched) < 1e-4


def test_the_graph_before_and_after(capture_toy) -> None:
    captured = capture_toy(within_the_product)
    names = {operation(node) for node in captured.graph.nodes}
    assert {"matmul", "softmax"} <= names and "baddbmm" not in names
    sites = find_sites(captured).matched
    module = rewrite(captured, sites, stored_alike(sites)).module
    assert not {"matmul", "softmax"} & {operation(node) for node in module.graph.nodes}
    (attend,) = (node for node in module.graph.nodes if operation(node) == "attend")
    slopes = module.get_buffer(str(as_node(attend.kwargs["slopes"]).target))
    assert slopes.dtype == torch.float32 and slopes.tolist() == pytest.approx(SLOPES, rel=1e-4)


def test_one_slope_serves_all_heads(capture_toy) -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        bias = 0.5 * distances_of(query) + additive_mask(query)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)

    captured = capture_toy(attend)
    sites = find_sites(captured).matched
    assert sites[0].score_function.slopes == pytest.approx((0.5,))
    assert verify(captured, sites) < 1e-4


def distances_of(query: Tensor) -> Tensor:
    token = torch.arange(query.shape[2])
    return token - token[:, None]


REFUSED: dict[str, tuple[Attend, str]] = {
    "within a soft cap": (
        lambda q, k, v: (torch.tanh(q @ k.mT + alibi(q)) + additive_mask(q)).softmax(-1) @ v,
        "bias",
    ),
    "of the content": (
        lambda q, k, v: (q @ k.mT + alibi(q) * q[..., :1] + additive_mask(q)).softmax(-1) @ v,
        "query-key products alone",
    ),
    "not linear": (lambda q, k, v: (q @ k.mT - alibi(q).square() + additive_mask(q)).softmax(-1) @ v, "linear"),
    "fused, not linear": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, (additive_mask(q) - alibi(q).square())[None]),
        "linear",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_not_guessed_at(capture_toy, name: str) -> None:
    attend, reason = REFUSED[name]
    sites = find_sites(capture_toy(attend))
    assert not sites.matched
    (refusal,) = sites.refused
    assert reason in refusal.reason
