"""Masks by probing: what lies between scores and softmax is recognised by what it does."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvmix_compile.passes.capture.captured import Captured
from kvmix_compile.passes.errors import UnsupportedModelError
from kvmix_compile.passes.match.masks import Mask, ScoreFunction, recognise
from kvmix_compile.passes.match.sites import find_sites

Scores = Callable[[Tensor], Tensor]
INFINITY = float("inf")


def distance(scores: Tensor) -> Tensor:
    """How far back each key lies, `[tokens, tokens]`; negative for keys to come."""
    tokens = torch.arange(scores.shape[-1], device=scores.device)
    return tokens[:, None] - tokens


def causal(scores: Tensor) -> Tensor:
    return distance(scores) >= 0


def random_causal_mask(tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(tokens, tokens, generator=generator) < 0.7).tril() | torch.eye(tokens, dtype=torch.bool)


# Recognising boolean masks

places = st.integers(min_value=1, max_value=60)


@given(tokens=places)
def test_causal(tokens: int) -> None:
    assert recognise(torch.ones(tokens, tokens, dtype=torch.bool).tril(), "layer") == Mask("causal")


@given(window=st.integers(min_value=1, max_value=47))
def test_sliding(window: int) -> None:
    back = distance(torch.empty(48, 48))
    assert recognise((back >= 0) & (back < window), "layer") == Mask("sliding", window)


@given(chunk=st.integers(min_value=2, max_value=47))
def test_chunked(chunk: int) -> None:
    chunks = torch.arange(48) // chunk
    allowed = (chunks[:, None] == chunks) & causal(torch.empty(48, 48))
    assert recognise(allowed, "layer") == Mask("chunked", chunk)


def test_a_window_as_long_as_the_text_is_none() -> None:
    back = distance(torch.empty(48, 48))
    assert recognise((back >= 0) & (back < 48), "layer") == Mask("causal")


@given(tokens=st.integers(min_value=2, max_value=60))
def test_attention_to_later_tokens_is_not_causal(tokens: int) -> None:
    with pytest.raises(UnsupportedModelError, match=r"layers\.3.*not causal"):
        recognise(torch.ones(tokens, tokens, dtype=torch.bool), "layers.3")


def test_a_prefix_that_sees_itself_whole_is_not_causal() -> None:
    prefix = torch.ones(48, 48, dtype=torch.bool).tril()
    prefix[:8, :8] = True
    with pytest.raises(UnsupportedModelError, match="not causal"):
        recognise(prefix, "layer")


@pytest.mark.parametrize(
    "allowed",
    [
        random_causal_mask(48),
        (distance(torch.empty(48, 48)) % 3 == 0) & causal(torch.empty(48, 48)),  # strided
        torch.ones(48, 48, dtype=torch.bool).tril(-1),  # not itself
        torch.ones(48, 48, dtype=torch.bool).tril() & (torch.arange(48) != 5),  # a hole
    ],
)
def test_other_masks_are_not_guessed_at(allowed: Tensor) -> None:
    with pytest.raises(UnsupportedModelError, match="layer: "):
        recognise(allowed, "layer")


def test_masks_name_themselves() -> None:
    assert [str(Mask("causal")), str(Mask("sliding", 24)), str(Mask("chunked", 8))] == [
        "causal",
        "sliding 24",
        "chunked 8",
    ]


# Score functions in graphs


def attention(between: Scores) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention with `between` applied between the scores and the softmax."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.softmax(between(query @ key.transpose(-1, -2)), dim=-1) @ value

    return attend


def additive(scores: Tensor, lowest: float = torch.finfo(torch.float32).min) -> Tensor:
    return torch.where(causal(scores), 0.0, lowest)


def same_chunk(scores: Tensor, size: int) -> Tensor:
    chunks = torch.arange(scores.shape[-1]) // size
    return chunks[:, None] == chunks


def less_the_largest(scores: Tensor) -> Tensor:
    """As models write it that keep a softmax of 16 bits stable."""
    return scores - scores.max(dim=-1, keepdim=True).values


ONE, CAPPED = ScoreFunction(1.0, 0.0, Mask("causal")), ScoreFunction(0.25, 5.0, Mask("causal"))
SPELLINGS: dict[str, tuple[Scores, ScoreFunction]] = {
    "masked_fill": (lambda s: s.masked_fill(~causal(s), -INFINITY), ONE),
    "masked_fill large": (lambda s: s.masked_fill(~causal(s), -1e9), ONE),
    "where": (lambda s: torch.where(causal(s), s, torch.finfo(s.dtype).min), ONE),
    "where infinity": (lambda s: torch.where(causal(s), s, -INFINITY), ONE),
    "additive": (lambda s: s + additive(s), ONE),
    "additive infinity": (lambda s: s + additive(s, -INFINITY), ONE),
    "times -1e9": (lambda s: s + (1 - causal(s).float()) * -1e9, ONE),
    "triu": (lambda s: s + torch.full_like(s, -INFINITY).triu(1), ONE),
    "masked multiply": (lambda s: s * causal(s) - 1e9 * ~causal(s), ONE),
    "scale before": (lambda s: (s * 0.25).masked_fill(~causal(s), -INFINITY), ScoreFunction(0.25, 0.0, Mask("causal"))),
    "scale after": (lambda s: s.masked_fill(~causal(s), -INFINITY) / 8, ScoreFunction(0.125, 0.0, Mask("causal"))),
    "large scale": (lambda s: (s * 3).masked_fill(~causal(s), -INFINITY), ScoreFunction(3.0, 0.0, Mask("causal"))),
    "computed in float64": (lambda s: (s.double() / 4 + additive(s)).float(), ScoreFunction(0.25, 0.0, Mask("causal"))),
    "cap then mask": (lambda s: 5 * torch.tanh(s / 4 / 5) + additive(s), CAPPED),
    "cap and scale in one": (lambda s: (torch.tanh(s / 20) * 5).masked_fill(~causal(s), -INFINITY), CAPPED),
    "sliding": (
        lambda s: s.masked_fill(~causal(s) | (distance(s) >= 6), -INFINITY),
        ScoreFunction(1.0, 0.0, Mask("sliding", 6)),
    ),
    "sliding and capped": (
        lambda s: (torch.tanh(s / 30) * 30).masked_fill(~causal(s) | (distance(s) >= 100), -1e9),
        ScoreFunction(1.0, 30.0, Mask("sliding", 100)),
    ),
    "ALiBi": (lambda s: s - distance(s) * 0.1 + additive(s), ScoreFunction(1.0, 0.0, Mask("causal"), (0.1,))),
    "ALiBi in a window": (
        lambda s: (s / 4 - distance(s) * 0.5).masked_fill(~causal(s) | (distance(s) >= 6), -INFINITY),
        ScoreFunction(0.25, 0.0, Mask("sliding", 6), (0.5,)),
    ),
    "chunked": (
        lambda s: s.masked_fill(~(causal(s) & same_chunk(s, 8)), -INFINITY),
        ScoreFunction(1.0, 0.0, Mask("chunked", 8)),
    ),
    "less the largest": (
        lambda s: less_the_largest((s / 4).masked_fill(~causal(s), -INFINITY)),
        ScoreFunction(0.25, 0.0, Mask("causal")),
    ),
    "a far scale": (
        lambda s: (s * 8).mul(1 / 64).masked_fill(~causal(s), -INFINITY),
        ScoreFunction(0.125, 0.0, Mask("causal")),
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_score_function_is_recognised_however_it_is_spelled(capture_toy, name: str) -> None:
    between, expected = SPELLINGS[name]
    sites = find_sites(capture_toy(attention(between)))
    assert not sites.refused
    (site,) = sites.matched
    assert site.mask == expected.mask
    assert site.score_function.scale == pytest.approx(expected.scale, rel=1e-5)
    assert site.score_function.softcap == pytest.approx(expected.softcap, rel=1e-5)
    assert site.score_function.slopes == pytest.approx(expected.slopes, rel=1e-5)


def within(captured: Captured, positions: int) -> Captured:
    """As if the model's configuration said that it has so many positions."""
    captured.model.config = SimpleNamespace(max_position_embeddings=positions)
    return captured


def test_a_window_in_a_mask_made_beforehand_is_found(capture_toy) -> None:
    """Nothing in the graph says how long it is: GPT-Neo keeps such a table for all its positions."""
    table = causal(torch.empty(400, 400)) & (distance(torch.empty(400, 400)) < 300)
    captured = capture_toy(attention(lambda s: s.masked_fill(~table[: s.shape[-2], : s.shape[-1]], -INFINITY)))
    (site,) = find_sites(within(captured, 400)).matched
    assert site.mask == Mask("sliding", 300)


def test_a_window_beyond_the_models_positions_is_none(capture_toy) -> None:
    captured = capture_toy(attention(lambda s: s.masked_fill(~causal(s) | (distance(s) >= 100), -INFINITY)))
    (site,) = find_sites(within(captured, 64)).matched
    assert site.mask == Mask("causal")


REFUSED: dict[str, tuple[Scores, str]] = {
    "no mask": (lambda s: s, "not causal"),
    "strided": (lambda s: s.masked_fill(~causal(s) | (distance(s) % 2 == 1), -INFINITY), "none of causal"),
    "a window too long to probe": (lambda s: s.masked_fill(~causal(s) | (distance(s) >= 10000), -INFINITY), "10000"),
    "a bias that is not linear": (lambda s: s - distance(s).abs().add(1).log() + additive(s), "bias"),
    "a mask for each head": (lambda s: s.masked_fill(~causal(s) | each_head_its_window(s), -INFINITY), "heads"),
    "not monotone": (lambda s: torch.sin(s) + additive(s), "not a scale, a soft cap and a mask"),
    "squared": (lambda s: s * s.abs() + additive(s), "not a scale, a soft cap and a mask"),
    "less the largest of others": (lambda s: s + additive(s) - s.max(-1, True).values, "not a scale"),
    "cut off below": (lambda s: s.clamp(min=-5) + additive(s), "not a scale, a soft cap and a mask"),
    "cut off above": (lambda s: s.clamp(max=500.0) + additive(s), "not a scale, a soft cap and a mask"),
    "far from zero only": (lambda s: torch.where(s < -1000, s / 2, s) + additive(s), "not a scale"),
    "hard cap": (lambda s: s.clamp(-1, 1) + additive(s), "not a scale, a soft cap and a mask"),
    "a scale that depends on the place": (
        lambda s: (s / (1 + distance(s).abs())).masked_fill(~causal(s), -INFINITY),
        "not a scale, a soft cap and a mask",
    ),
}


def each_head_its_window(scores: Tensor) -> Tensor:
    windows = torch.arange(1, scores.shape[1] + 1)[:, None, None] * 4
    return distance(scores) >= windows


@pytest.mark.parametrize("name", REFUSED)
def test_other_score_functions_are_refused_by_layer_and_reason(capture_toy, name: str) -> None:
    between, reason = REFUSED[name]
    sites = find_sites(capture_toy(attention(between)))
    assert not sites.matched
    (refusal,) = sites.refused
    assert reason in refusal.reason
