"""Measure: gradient norms are autograd's, sensitivities are gradient times the quantizer's own error."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvmix_compile.kernels.format.packing import dequantize_block, quantize_block
from kvmix_compile.kernels.format.precision import Axis, Precision
from kvmix_compile.models_zoo import plain
from kvmix_compile.models_zoo.tiny import tiny
from kvmix_compile.passes.capture.captured import Captured
from kvmix_compile.passes.capture.export import capture, logits_of
from kvmix_compile.passes.errors import CalibrationError
from kvmix_compile.passes.match.sites import find_sites
from kvmix_compile.passes.measure.importance import Importance, fingerprint, measure
from kvmix_compile.passes.measure.sensitivity import CANDIDATE_TIERS, candidates_for
from kvmix_compile.passes.rewrite.rotation import back, there

SINKS, RECENT = 8, 32


def rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 128, (tokens,), generator=generator) for tokens in (48, 75)]


def measured(captured: Captured, on_rows: list[Tensor] | None = None) -> Importance:
    sites = find_sites(captured).matched
    return measure(captured, sites, on_rows or rows(), sinks=SINKS, recent=RECENT)


def loss_of(model: nn.Module, row: Tensor, reduction: str = "mean") -> Tensor:
    logits = logits_of(model(row[None]))
    return F.cross_entropy(logits[0, :-1], row[1:], reduction=reduction)


# For layer 0 of each model: its projections of keys and values, as slices of weights.
HEADS, DIM, WIDTH = 4, 32, 128
Slices = Callable[[nn.Module], tuple[tuple[nn.Parameter, object], tuple[nn.Parameter, object]]]


def separate(attention: str, key: str = "k_proj", value: str = "v_proj") -> Slices:
    def slices(model: nn.Module):
        module = model.get_submodule(attention)
        return (getattr(module, key).weight, slice(None)), (getattr(module, value).weight, slice(None))

    return slices


def fused(projection: str, key: object, value: object) -> Slices:
    def slices(model: nn.Module):
        weight = model.get_submodule(projection).weight
        return (weight, key), (weight, value)

    return slices


def interleaved(part: int) -> list[int]:
    """Rows of a projection that lists query, key and value of one head after another."""
    return [head * 3 * DIM + part * DIM + channel for head in range(HEADS) for channel in range(DIM)]


WEIGHTS: dict[str, Slices] = {
    "llama": separate("model.layers.0.self_attn"),
    "qwen3": separate("model.layers.0.self_attn"),
    "gemma2": separate("model.layers.0.self_attn"),
    "hand_written": separate("layers.0.attention", "key", "value"),
    "phi3": fused("model.layers.0.self_attn.qkv_proj", slice(WIDTH, WIDTH + 64), slice(WIDTH + 64, None)),
    # Conv1D keeps its weight transposed.
    "gpt2": fused(
        "transformer.h.0.attn.c_attn", (slice(None), slice(WIDTH, 2 * WIDTH)), (slice(None), slice(2 * WIDTH, None))
    ),
    "gpt_neox": fused("gpt_neox.layers.0.attention.query_key_value", interleaved(1), interleaved(2)),
    "falcon": fused(
        "transformer.h.0.self_attention.query_key_value", slice(WIDTH, WIDTH + DIM), slice(WIDTH + DIM, None)
    ),
    "fused_arange": fused("layers.0.attention.qkv", slice(64, 128), slice(128, None)),
}


@contextmanager
def without_leftovers(model: nn.Module) -> Iterator[None]:
    yield
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", WEIGHTS)
def test_gradient_norms_are_those_of_the_models_own_weights(captured, name: str) -> None:
    """s_k and s_v of KVmix: the norm for each row of the mean next-token loss's gradient, averaged over rows."""
    importance = measured(captured(name))
    model = captured(name).model
    norms = torch.zeros(2, dtype=torch.float64)
    with without_leftovers(model):
        for row in rows():
            model.zero_grad(set_to_none=True)
            with torch.enable_grad():
                loss_of(model, row).backward()
            norms += torch.stack([weight.grad[part].norm().double() for weight, part in WEIGHTS[name](model)])
    site = importance.sites[0]
    found = torch.tensor([site.key_gradient_norm, site.value_gradient_norm], dtype=torch.float64)
    torch.testing.assert_close(found, norms / len(rows()), rtol=1e-3, atol=0)


def test_sensitivity_is_half_the_squared_sum_of_gradients_times_errors(captured, monkeypatch) -> None:
    """Against a computation of its own: attention in the model whose tokens read old keys and values from leaves, each
    from one of its own.
    """
    graph = captured("fused_arange")
    model, importance = graph.model, measured(graph)
    stored: list[tuple[Tensor, Tensor]] = []

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
        tokens = query.shape[-2]
        # What a row of this length is measured with: half of its tokens read from storage.
        shortened = max(1.0, 2 * (SINKS + RECENT) / tokens)
        sinks, recent = int(SINKS / shortened), int(RECENT / shortened)
        token = torch.arange(tokens)
        old = (token[:, None] - token >= recent) & (token >= sinks)
        # [batch, heads, reading tokens, stored tokens, dim]
        leaves = [side.detach()[:, :, None].repeat(1, 1, tokens, 1, 1).requires_grad_() for side in (key, value)]
        stored.append((leaves[0], leaves[1]))
        scores_of_old = (query[:, :, :, None] * leaves[0]).sum(-1)
        scores = torch.where(old, scores_of_old, query @ key.mT) / query.shape[-1] ** 0.5
        weights = scores.masked_fill(token > token[:, None], -torch.inf).softmax(-1)
        of_old = (weights.masked_fill(~old, 0)[..., None] * leaves[1]).sum(-2)
        return of_old + weights.masked_fill(old, 0) @ value

    monkeypatch.setattr(plain.F, "scaled_dot_product_attention", attention)
    expected: dict[tuple[str, Precision], float] = {}
    with without_leftovers(model):
        for row in rows():
            stored.clear()
            with torch.enable_grad():
                loss_of(model, row, "sum").backward()
            shortened = max(1.0, 2 * (SINKS + RECENT) / len(row))
            sinks, recent = int(SINKS / shortened), int(RECENT / shortened)
            blocks = (len(row) - sinks) // 32
            for leaf, axis in zip(stored[1], (Axis.TOKENS, Axis.CHANNELS), strict=True):
                assert leaf.grad is not None
                kept = leaf.detach()[0, :, 0, sinks : sinks + 32 * blocks]
                slope = leaf.grad[0, :, :, sinks : sinks + 32 * blocks]
                if axis == Axis.CHANNELS:  # stored rotated
                    kept, slope = kept @ there(16, kept), slope @ back(16, slope).T
                for precision in candidates_for(16, axis):
                    error = round_trip(kept, precision, axis, blocks) - kept
                    change = (slope * error[:, None]).sum(dim=2)
                    loss = 0.5 * change.square().sum().item() / (len(row) - sinks - recent)
                    expected[axis, precision] = expected.get((axis, precision), 0.0) + loss / len(rows())
    site = importance.sites[1]
    for precision in candidates_for(16, Axis.TOKENS):
        assert site.key_sensitivity[precision] == pytest.approx(expected[Axis.TOKENS, precision], rel=1e-3)
    for precision, loss in site.value_sensitivity.items():
        assert loss == pytest.approx(expected[Axis.CHANNELS, precision], rel=1e-3)


def test_the_most_important_tiers_of_the_channels_are_those_that_would_lose_most(captured) -> None:
    """Keys with eight channels blown up, and queries with the same ones shrunk, so that the scores stay."""
    model = copy.deepcopy(captured("fused_arange").model)
    loud = [1, 2, 5, 6, 9, 11, 14, 15]
    weight = model.layers[1].attention.qkv.weight.data.unflatten(0, (3, 4, 16))
    # A channel kept at the scale of its own range loses as much at any size; only a rare large element is different.
    weight[1, :, loud] *= 8
    importance = measured(capture(model))
    site = importance.sites[1]
    for tiers in site.channel_tiers:
        assert {channel for channel, tier in enumerate(tiers) if tier in "01"} == set(loud)
    # A head of 16 channels has halves that can be packed, and no tiers.
    divided = [precision for precision in site.key_sensitivity if precision.important_bits]
    halves = [bits for bits in CANDIDATE_TIERS if bits[0] == bits[1] and bits[2] == bits[3]]
    assert {precision.tiers for precision in divided} == set(halves)
    for precision in divided:
        rich, poor = (
            site.key_sensitivity[Precision(bits, precision.group, 4)] for bits in (precision.tiers[0], precision.bits)
        )
        assert rich <= site.key_sensitivity[precision] <= poor
        assert site.key_sensitivity[precision] < (rich + poor) / 2


def round_trip(stored: Tensor, precision: Precision, axis: Axis, blocks: int) -> Tensor:
    if not precision.is_quantized:
        return stored
    packed = quantize_block(stored.unflatten(1, (blocks, 32)).contiguous(), precision, axis)
    return dequantize_block(packed, precision, axis, stored.shape[-1], torch.float32).flatten(1, 2)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_more_bits_cost_less(captured, name: str) -> None:
    importance = measured(captured(name))
    totals: dict[int, float] = {}
    for site in importance.sites:
        for sensitivity in (site.key_sensitivity, site.value_sensitivity):
            assert all(loss >= 0 for loss in sensitivity.values())
            for precision, loss in sensitivity.items():
                totals[precision.bits] = totals.get(precision.bits, 0.0) + loss
    in_order = [totals[bits] for bits in sorted(totals)]
    assert {2, 4, 16} <= set(totals)
    assert in_order == sorted(in_order, reverse=True) and in_order[-1] == 0.0
    assert totals[2] > 4 * totals[4]


def test_what_was_measured_is_said(captured) -> None:
    graph = captured("llama")
    importance = measured(graph)
    sites = find_sites(graph).matched
    assert [site.layer for site in importance.sites] == [site.layer for site in sites]
    assert (importance.sinks, importance.recent, importance.tokens) == (SINKS, RECENT, 48 + 75)
    with torch.no_grad():
        total = sum(loss_of(graph.model, row, "sum").item() for row in rows())
    assert importance.loss == pytest.approx(total / (47 + 74), rel=1e-4)


def test_measuring_leaves_no_gradients_and_calls_back_after_each_row(captured) -> None:
    graph, called = captured("llama"), []
    sites = find_sites(graph).matched
    measure(graph, sites, rows(), sinks=0, recent=RECENT, on_row=lambda: called.append(1))
    assert len(called) == 2
    assert all(parameter.grad is None and parameter.requires_grad for parameter in graph.model.parameters())


def test_frozen_weights_can_be_measured() -> None:
    model = plain.fused_arange().requires_grad_(False)
    importance = measured(capture(model))
    assert all(site.key_gradient_norm > 0 and site.value_gradient_norm > 0 for site in importance.sites)


def test_measuring_is_reproducible(captured) -> None:
    assert measured(captured("hand_written")) == measured(captured("hand_written"))


def test_rows_shorter_than_a_block_are_refused(captured) -> None:
    with pytest.raises(CalibrationError, match="32 tokens"):
        measured(captured("llama"), [torch.arange(3, 20)])


def test_a_row_shorter_than_its_sinks_still_counts(captured) -> None:
    graph = captured("fused_arange")
    importance = measure(graph, find_sites(graph).matched, rows()[:1], sinks=100, recent=RECENT)
    assert all(loss > 0 for loss in list(importance.sites[0].key_sensitivity.values())[:3])


@pytest.mark.parametrize(
    ("dim", "groups"),
    [(64, {16, 32, 64}), (96, {16, 32}), (80, {16}), (16, {16}), (24, {24}), (104, {26}), (20, set())],
)
def test_candidates_fit_the_head(dim: int, groups: set[int]) -> None:
    quantized = [precision for precision in candidates_for(dim, Axis.CHANNELS) if precision.is_quantized]
    assert {precision.group for precision in quantized} == groups
    for precision in quantized:
        precision.check(dim, Axis.CHANNELS)
    for precision in candidates_for(dim, Axis.TOKENS):
        precision.check(dim, Axis.TOKENS)


def fingerprint_of(model: nn.Module) -> str:
    graph = capture(model)
    return fingerprint(graph, find_sites(graph).matched)


def test_a_fingerprint_is_of_the_structure_not_of_the_weights() -> None:
    assert fingerprint_of(plain.fused_arange()) == fingerprint_of(plain.fused_arange(seed=1))
    others = [
        plain.fused_arange(layers=1),
        plain.fused_arange(heads=2),
        plain.fused_arange(vocabulary=64),
        plain.hand_written(),
    ]
    assert len({fingerprint_of(model) for model in (plain.fused_arange(), *others)}) == 5


def test_importance_becomes_a_plan(captured) -> None:
    importance = measured(captured("llama"))
    plan = importance.allocate(budget=2.3)
    assert plan.code_bits <= 2.3 and plan.policy == "fisher"
    assert (plan.sinks, plan.recent, plan.fingerprint) == (SINKS, RECENT, importance.fingerprint)
    assert importance.allocate(storage_budget=3.0).storage_bits <= 3.0
    assert importance.allocate(budget=16).code_bits == 16
    assert {site.key.bits for site in importance.allocate(budget=2.3, policy="kvmix").sites} <= {2, 3}


def test_a_layer_without_weights_of_its_own_has_no_gradient_norm() -> None:
    """tiny has no such model, so nothing but a NaN may come of it: fisher does not need it and kvmix says so."""

    class Unprojected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(128, 32), nn.Linear(32, 128)

        def forward(self, input_ids: Tensor) -> Tensor:
            states = self.embedding(input_ids).unflatten(-1, (4, 8)).transpose(1, 2)
            mixed = F.scaled_dot_product_attention(states, states, states, is_causal=True)
            return self.head(mixed.transpose(1, 2).flatten(2))

    importance = measured(capture(Unprojected().eval()))
    assert importance.sites[0].key_gradient_norm != importance.sites[0].key_gradient_norm
    assert importance.allocate(budget=3).code_bits <= 3


def written_in_place(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Keys assembled in a buffer, as multi-head latent attention writes them."""
    assembled = key.new_empty(key.shape)
    assembled[..., :4] = key[..., 4:]
    assembled[..., 4:] = key[..., :4].sin()
    return F.scaled_dot_product_attention(query, assembled, value, is_causal=True)


def written_at_once(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    assembled = torch.cat([key[..., 4:], key[..., :4].sin()], dim=-1)
    return F.scaled_dot_product_attention(query, assembled, value, is_causal=True)


def test_keys_written_in_place_are_measured_like_others(capture_toy) -> None:
    on_rows = [row % 64 for row in rows()]
    in_place, at_once = (measured(capture_toy(toy), on_rows) for toy in (written_in_place, written_at_once))
    for site, expected in zip(in_place.sites, at_once.sites, strict=True):
        assert site.key_sensitivity == pytest.approx(expected.key_sensitivity, rel=1e-4)
        assert site.key_sensitivity[Precision(2, 32, 4)] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_as_many_bits_in_the_model_measure_the_same(dtype: torch.dtype) -> None:
    """float16's values are rotated with another power of two, which must not count."""
    model = tiny("llama", num_hidden_layers=1).to(dtype)
    narrow, wide = (measured(capture(each)).sites[0] for each in (model, copy.deepcopy(model).float()))
    assert narrow.key_gradient_norm == pytest.approx(wide.key_gradient_norm, rel=0.05)
    for precision in (Precision(2, 32, 4), Precision(4, 32, 4)):
        assert narrow.value_sensitivity[precision] == pytest.approx(wide.value_sensitivity[precision], rel=0.1)
        assert narrow.key_sensitivity[precision] == pytest.approx(wide.key_sensitivity[precision], rel=0.1)


def test_what_a_chunk_reads_from_storage_counts_wherever_the_row_ends() -> None:
    """Of 96 tokens in chunks of 64, those from 36 to 63 read the blocks that begin behind the sinks."""
    captured = capture(tiny("llama4", attention_chunk_size=64))
    row = torch.randint(3, 128, (96,), generator=torch.Generator().manual_seed(0))
    chunked = [site for site in find_sites(captured).matched if site.score_function.mask.kind == "chunked"]
    site = measure(captured, chunked[:1], [row], sinks=4, recent=32).sites[0]
    assert chunked and min(loss for precision, loss in site.key_sensitivity.items() if precision.is_quantized) > 0
    assert min(loss for precision, loss in site.value_sensitivity.items() if precision.is_quantized) > 0
