"""Stored once: keys and values that several attentions read."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvmix_compile.kernels.format.precision import Precision
from kvmix_compile.kernels.format.state import SiteState, StateLayout
from kvmix_compile.passes.allocate.plan import Plan, SitePlan
from kvmix_compile.passes.capture.captured import Captured
from kvmix_compile.passes.match.sites import AttentionSite, find_sites
from kvmix_compile.passes.measure.importance import measure
from kvmix_compile.passes.rewrite.rewrite import rewrite
from kvmix_compile.passes.rewrite.verify import verify

SINKS, RECENT, TOKENS = 4, 32, 150
CHUNKS = (100, 7, 1, 1, 41)
DIM = 32


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def three_times(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What two attentions give is part of the next one's queries; the last of them divides its scores otherwise."""
    second = causal(query + causal(query, key, value), key, value)
    return F.scaled_dot_product_attention(query - second, key, value, is_causal=True, scale=0.3, enable_gqa=True)


def within(tokens: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """As three_times, of two, and the second sees the last few tokens alone."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        position = torch.arange(query.shape[2], device=query.device)
        distance = position[:, None] - position
        mask = (distance >= 0) & (distance < tokens)
        first = causal(query, key, value)
        return F.scaled_dot_product_attention(query + first, key, value, mask, enable_gqa=True)

    return attend


@pytest.fixture(scope="module")
def shared(capture_toy: Callable[..., Captured]) -> Captured:
    return capture_toy(three_times, heads=4, kv_heads=2, head_dim=DIM)


def apart(site: AttentionSite) -> list[AttentionSite]:
    """Its attentions as sites that each store what they read."""
    return [replace(attention, readers=()) for attention in site.attentions]


def planned(sites: list[AttentionSite], exact_chunks: bool = False, **chosen: object) -> Plan:
    """The same for each of the sites."""
    of_sites = tuple(SitePlan(**{"layer": site.layer, "shape": site.shape, **chosen}) for site in sites)  # type: ignore[arg-type]
    return Plan(of_sites, "by hand", "", SINKS, RECENT, exact_chunks=exact_chunks)


def logits(captured: Captured, sites: list[AttentionSite], plan: Plan) -> tuple[Tensor, list[SiteState]]:
    """Of two rows that come in chunks, the second with padding in front of it; and the states at the end."""
    rewritten = rewrite(captured, sites, plan.stored_sites())
    layouts: tuple[StateLayout, ...] = plan.layouts()
    states = [SiteState.allocate(layout, 2, 8, torch.float32, torch.device("cpu")) for layout in layouts]
    tensors = [tensor for state in states for tensor in state.tensors()]
    ids = torch.randint(captured.vocabulary, (2, TOKENS), generator=torch.Generator().manual_seed(3))
    lengths, starts, found = torch.zeros(2, dtype=torch.int64), torch.tensor([0, 5]), []
    for part in ids.split(list(CHUNKS), dim=1):
        every = torch.arange(part.shape[1])
        positions = (lengths[:, None] + every - starts[:, None]).clamp(min=0)
        found.append(rewritten.module(part, positions, every, lengths, starts, *tensors))
        lengths, starts = lengths + part.shape[1] - starts, torch.zeros_like(starts)
    return torch.cat(found, dim=1)[:, 5:], states


LOW = {
    "key": Precision(2, 32, 4, important_bits=(4, 3)),
    "value": Precision(2, 16, 4),
    "channel_tiers": ("0123" * 8, "3210" * 8),
    "values_rotated": True,
    "key_exponents": (1, -2),
    "value_exponents": (3, 0),
}


@pytest.mark.parametrize("exact_chunks", [False, True])
def test_it_is_read_as_if_each_attention_had_stored_it(shared: Captured, exact_chunks: bool) -> None:
    (site,) = find_sites(shared).matched
    assert len(site.readers) == 2 and site.attention == "causal, read by 2 more"
    once, (state,) = logits(shared, [site], planned([site], exact_chunks, **LOW))
    expected, states = logits(shared, apart(site), planned(apart(site), exact_chunks, **LOW))
    torch.testing.assert_close(once, expected, atol=0, rtol=0)
    for other in states:
        assert all(torch.equal(mine, its) for mine, its in zip(state.tensors(), other.tensors(), strict=True))


def test_with_16_bits_nothing_is_lost(shared: Captured) -> None:
    assert verify(shared, find_sites(shared).matched) < 1e-4


def test_what_it_loses_is_what_each_of_its_readers_does(shared: Captured) -> None:
    (site,) = find_sites(shared).matched
    row = torch.randint(shared.vocabulary, (90,), generator=torch.Generator().manual_seed(1))
    (once,) = measure(shared, [site], [row], sinks=SINKS, recent=RECENT).sites
    each = measure(shared, apart(site), [row], sinks=SINKS, recent=RECENT).sites
    for precision, loss in once.value_sensitivity.items():
        assert loss == pytest.approx(sum(other.value_sensitivity[precision] for other in each), rel=1e-5)
    assert once.key_gradient_norm == pytest.approx(each[0].key_gradient_norm)


def test_of_another_window_it_is_stored_again(capture_toy: Callable[..., Captured]) -> None:
    windows = capture_toy(within(20), heads=2, kv_heads=2)
    first, second = find_sites(windows).matched
    assert (first.window, second.window) == (0, 20) and not (first.readers or second.readers)
    assert verify(windows, (first, second)) < 1e-4
