"""Opponents: their quantizers do what their papers say, and their cache has the same unquantized tokens as ours."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from kvmix_compile.evaluate.baselines import BASELINES, check_baselines
from kvmix_compile.evaluate.comparison import compare
from kvmix_compile.evaluate.configurations import Configuration
from kvmix_compile.evaluate.opponents import OPPONENTS, Rotations, simulated_caches
from kvmix_compile.evaluate.quantizers import asymmetric, clipped, normal_levels, q4_0, turbo, variance_normalized
from kvmix_compile.evaluate.simulated import Simulated, SimulatedLayer, Stored
from kvmix_compile.evaluate.spectral import spectral_rotations
from kvmix_compile.kernels.format.state import packed_blocks
from kvmix_compile.models_zoo.tiny import tiny
from kvmix_compile.passes.match.sites import find_sites
from kvmix_compile.passes.rewrite.rotation import there
from tests.helpers.one_capture import analyzed, captured_once, zoo
from tests.helpers.toy_llama import RECENT, SINKS, ids, original

IDENTITY = torch.eye(64).expand(2, 64, 64)
QUANTIZERS = {
    "q4_0": q4_0,
    "kvarn keys": partial(variance_normalized, bits=4, keys=True),
    "kvarn values": partial(variance_normalized, bits=2, keys=False),
    "turbo 4": partial(turbo, bits=4),
    "turbo 3": partial(turbo, bits=3),
    "oscar": partial(clipped, bits=2, rotation=IDENTITY, kept=0.96),
}
# Of normally distributed elements. The levels' own: 0.0095 and 0.0345 (Max 1960), 0.119 for two bits.
ERRORS = {
    "q4_0": 0.008,
    "kvarn keys": 0.010,
    "kvarn values": 0.21,
    "turbo 4": 0.0100,
    "turbo 3": 0.036,
    "oscar": 0.17,
}


def tile(seed: int = 0, tokens: int = 128) -> Tensor:
    return torch.randn(1, 2, tokens, 64, generator=torch.Generator().manual_seed(seed))


def error(quantizer, elements: Tensor) -> float:
    return ((quantizer(elements) - elements).square().mean() / elements.square().mean()).item()


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_normal_distribution_is_read_as_well_as_so_many_bits_can(name: str) -> None:
    found = error(QUANTIZERS[name], tile())
    assert 0.6 * ERRORS[name] < found < ERRORS[name]


@pytest.mark.parametrize("name", QUANTIZERS)
@given(power=st.integers(-3, 3), seed=st.integers(0, 5))
def test_of_larger_elements_the_error_is_as_much_larger(name: str, power: int, seed: int) -> None:
    elements = tile(seed, tokens=32)
    torch.testing.assert_close(
        QUANTIZERS[name](elements * 2.0**power),
        QUANTIZERS[name](elements) * 2.0**power,
        rtol=1e-2,
        atol=1e-3 * 2.0**power,
    )


@pytest.mark.parametrize("name", QUANTIZERS)
def test_zeros_stay_zeros(name: str) -> None:
    assert QUANTIZERS[name](torch.zeros(1, 2, 32, 64)).abs().max() < 1e-6


def test_what_q4_0_has_codes_for_is_read_as_it_was() -> None:
    codes = torch.randint(-8, 8, (1, 2, 32, 64), generator=torch.Generator().manual_seed(0)).float()
    codes[..., ::32] = -8  # each block's largest
    elements = codes @ torch.linalg.inv(there(64, codes))
    torch.testing.assert_close(q4_0(elements), elements, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [3, 4])
def test_turbo_keeps_the_length_of_a_vector(bits: int) -> None:
    elements = tile()
    torch.testing.assert_close(turbo(elements, bits).norm(dim=-1), elements.norm(dim=-1), rtol=1e-3, atol=0)


def test_the_levels_are_those_of_max() -> None:
    """J. Max, Quantizing for minimum distortion (1960), table I."""
    assert normal_levels(2)[2:].tolist() == pytest.approx([0.4528, 1.510], abs=2e-3)
    assert normal_levels(3)[4:].tolist() == pytest.approx([0.2451, 0.7560, 1.344, 2.152], abs=4e-3)


@pytest.mark.parametrize("keys", [True, False])
def test_variance_normalization_evens_out_tokens_and_rotated_channels(keys: bool) -> None:
    of_token, of_channel = torch.logspace(-1, 1, 128)[:, None], torch.logspace(-1, 1, 64)[None]
    uneven = (tile() * of_token * of_channel) @ torch.linalg.inv(there(64, tile()))

    def without(elements: Tensor) -> Tensor:
        rotated = asymmetric(elements @ there(64, elements), 2, -2 if keys else -1)
        return rotated @ torch.linalg.inv(there(64, elements))

    weights = 1 / (of_token * of_channel)

    def weighted(quantizer) -> float:
        wrong = (quantizer(uneven) - uneven) @ there(64, uneven) * weights
        return wrong.square().mean().item()

    assert 2 * weighted(partial(variance_normalized, bits=2, keys=keys)) < weighted(without)


def test_channels_with_a_large_mean_do_not_let_the_scales_run_away() -> None:
    """As keys have them."""
    elements = tile() + 10 * (torch.arange(64) == 7) - 5 * (torch.arange(64) == 20)
    for keys in (True, False):
        assert error(partial(variance_normalized, bits=4, keys=keys), elements) < 0.02


def test_clipping_nothing_without_rotation_is_rounding_to_the_nearest() -> None:
    assert torch.equal(clipped(tile(), 2, IDENTITY, 1.0), asymmetric(tile(), 2, -1))
    steps = (tile().amax(-1) - tile().amin(-1)) / 3
    assert ((asymmetric(tile(), 2, -1) - tile()).abs().amax(-1) < 0.51 * steps).all()


def rotations_of(model: PreTrainedModel, rows: list[Tensor]) -> list[Rotations]:
    captured = captured_once(model)
    return spectral_rotations(captured, find_sites(captured).matched, rows)


def test_spectral_rotations_spread_what_queries_tell_apart_evenly() -> None:
    model = original()
    for key, value in rotations_of(model, list(ids(2, 64))):
        for rotation in (key, value):
            torch.testing.assert_close(rotation @ rotation.mT, torch.eye(rotation.shape[-1]).expand_as(rotation))
    (key, _), *_ = rotations_of(model, [ids(1, 64)[0]])
    queries = _first_queries(model, ids(1, 64))
    rotated = queries @ key.repeat_interleave(len(queries) // len(key), 0)
    of_group = rotated.square().unflatten(0, (len(key), -1)).mean((1, 2))
    torch.testing.assert_close(of_group, of_group.mean(-1, keepdim=True).expand_as(of_group), rtol=1e-3, atol=0)


def _first_queries(model, text: Tensor) -> Tensor:
    """Of the first layer, `[query heads, tokens, dim]`, as attention is given them."""
    found: list[Tensor] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def watched(query: Tensor, *others, **options) -> Tensor:
        found.append(query)
        return plain(query, *others, **options)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
        model(text)
    return found[0][0]


# The cache


@given(cuts=st.lists(st.integers(1, 60), min_size=1, max_size=6), tile_tokens=st.sampled_from([32, 64]))
def test_what_has_left_the_recent_window_is_read_as_stored_and_nothing_else(cuts: list[int], tile_tokens: int) -> None:
    layer = SimulatedLayer(lambda keys: keys + 1, lambda values: -values, tile_tokens, SINKS, RECENT)
    given_keys, given_values = tile(0, sum(cuts)), tile(1, sum(cuts))
    begin = 0
    for tokens in cuts:
        end = begin + tokens
        keys, values = layer.update(given_keys[:, :, begin:end], given_values[:, :, begin:end])
        # Tiles of blocks are as many as our own cache has of this length.
        assert tile_tokens != 32 or layer.stored == 32 * packed_blocks(begin, SINKS, RECENT)
        assert RECENT - 31 <= begin - SINKS - layer.stored <= RECENT - 32 + tile_tokens or layer.stored == 0
        stored = torch.zeros(end, dtype=torch.bool)
        stored[SINKS : SINKS + layer.stored] = True
        torch.testing.assert_close(keys, given_keys[:, :, :end] + stored[:, None].float())
        torch.testing.assert_close(values, given_values[:, :, :end] * (1 - 2 * stored[:, None].float()))
        begin = end


def exact_caches(name: str) -> Simulated:
    model = zoo(name)
    as_it_is = [Stored(lambda elements: elements, 16, 16)] * model.config.num_hidden_layers
    return Simulated("exact", model, keys=as_it_is, values=as_it_is, tile=32, sinks=SINKS, recent=RECENT)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_quantizer_that_changes_nothing_is_the_original(name: str) -> None:
    _, found = compare([Configuration("original", zoo(name)), exact_caches(name)], ids(1, 200)[0])
    assert found.divergence.largest < 1e-5
    assert found.stored_bits == found.held_bits == 16


@pytest.mark.parametrize("name", OPPONENTS)
def test_every_opponent_is_measured(name: str) -> None:
    model = original()
    check_baselines([name], model)
    importance = analyzed(model, calibration=ids(2, 128), sinks=SINKS, recent=RECENT)
    (opponent,) = simulated_caches([name], model, importance, lambda: rotations_of(model, list(ids(2, 64))))
    _, found = compare([Configuration("original", model), opponent], ids(1, 300)[0])
    assert opponent.code_bits < opponent.stored_bits < found.held_bits < 16
    assert 0 < found.divergence.mean < 1
    assert math.isfinite(found.perplexity)


def test_bits_of_the_opponents() -> None:
    """For heads of 32 channels, as they say how much is stored."""
    importance = analyzed(original(), calibration=ids(2, 128), sinks=SINKS, recent=RECENT)
    rotations = [(torch.eye(32).expand(2, 32, 32),) * 2] * len(importance.sites)
    found = {
        each.name: (each.code_bits, each.stored_bits)
        for each in simulated_caches(OPPONENTS, original(), importance, lambda: rotations)
    }
    assert found == {
        "q4_0-hadamard": (4, 4.5),
        "kvarn-k4v2": (3, pytest.approx(3 + (0.25 + 0.5 + 1 + 0.125) / 2)),
        "turboquant-4": (4, 4.5),
        "turboquant-3": (3, 3.5),
        "oscar-2": (2, 3),
    }


def test_opponents_are_baselines() -> None:
    assert set(OPPONENTS) < set(BASELINES)


def test_windows_are_no_hindrance() -> None:
    check_baselines(["q4_0-hadamard"], tiny("gemma2"))
