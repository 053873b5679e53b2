"""Keys read again with their errors: as attention written out says, and where the first order says nothing."""

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from kvmix_compile.errors import PredictedLossWarning
from kvmix_compile.kernels.format.precision import Axis, Precision
from kvmix_compile.models_zoo.tiny import tiny
from kvmix_compile.passes.match.masks import Mask, ScoreFunction
from kvmix_compile.passes.measure.read_again import READERS, KeyReaders
from kvmix_compile.passes.measure.sensitivity import Tally
from kvmix_compile.passes.measure.stored_reads import RowAttention, stored_reads
from tests.helpers.one_capture import applied

TOKENS, SINKS, RECENT = 20, 3, 6
CAUSAL = ScoreFunction(0.3, 0.0, Mask("causal"))


def random(heads: int, dim: int) -> Tensor:
    return torch.randn(heads, TOKENS, dim)


def changes(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor, function: ScoreFunction, error: Tensor, sink_logits: Tensor | None
) -> Tensor:
    """Of the loss by what each token reads with each query head, `[query heads, tokens]`, one at a time."""
    shared, found = q.shape[0] // k.shape[0], torch.zeros(q.shape[0], TOKENS)
    for head in range(q.shape[0]):
        for token in range(TOKENS):
            first = max(0, token - function.mask.size + 1) if function.mask.kind == "sliding" else 0
            seen = torch.arange(first, token + 1)
            old = (seen >= SINKS) & (seen <= token - RECENT)
            read = []
            for keys in (k[head // shared, seen], (k + error)[head // shared, seen] * old[:, None]):
                mixed = torch.where(old[:, None], keys, k[head // shared, seen])
                scores = mixed @ q[head, token] * function.scale
                if function.softcap:
                    scores = function.softcap * torch.tanh(scores / function.softcap)
                if function.slopes:
                    scores = scores + function.slopes[head % len(function.slopes)] * (seen - token)
                weights = scores.exp()
                sink = 0 if sink_logits is None else sink_logits[head].exp()
                read.append((weights / (weights.sum() + sink)) @ v[head // shared, seen] @ slope[head, token])
            found[head, token] = read[1] - read[0]
    return found


@pytest.mark.parametrize(
    "function",
    [
        CAUSAL,
        ScoreFunction(0.3, 1.5, Mask("causal")),
        ScoreFunction(0.3, 0.0, Mask("sliding", 9)),
        ScoreFunction(0.3, 0.0, Mask("causal"), (0.2,)),
        ScoreFunction(0.3, 1.5, Mask("sliding", 9), (0.5, 0.1, 0.2, 0.05, 0.3, 0.0)),
    ],
    ids=["causal", "softcap", "sliding", "a slope", "softcap, sliding and slopes"],
)
@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize("with_sink_logits", [False, True])
def test_it_is_attention_with_the_errors_in_it(function: ScoreFunction, shared: int, with_sink_logits: bool) -> None:
    torch.manual_seed(0)
    function = replace(function, slopes=function.slopes[: 2 * shared])
    q, k, v, slope = random(2 * shared, 8), random(2, 8), random(2, 5), random(2 * shared, 5)
    logits = torch.randn(2 * shared) if with_sink_logits else None
    error = random(2, 8)
    readers = KeyReaders.of(RowAttention(q, k, v, slope, function, SINKS, RECENT, logits))
    # A row of so many tokens has fewer readers than there may be: all of them.
    reading = TOKENS - SINKS - RECENT
    assert reading <= READERS
    expected = changes(q, k, v, slope, function, error, logits)[:, SINKS + RECENT :]
    found = readers.loss(error[:, 2:], slice(2, TOKENS))
    assert found == pytest.approx(0.5 * expected.square().sum().item() / reading, rel=1e-4)


def first_order(attention: tuple, error: Tensor) -> float:
    """What all readers lose by stored_reads."""
    reads, _ = stored_reads(RowAttention(*attention))
    return 0.5 * reads.changes(error, slice(None)).sum(-1).square().sum().item() / (TOKENS - SINKS - RECENT)


def test_errors_of_some_channels_are_errors_of_a_whole_key() -> None:
    torch.manual_seed(0)
    q, k, v, slope = (torch.randn(2, 40, dim) for dim in (8, 8, 5, 5))
    row, matrix, error = RowAttention(q, k, v, slope, CAUSAL, SINKS, RECENT), torch.randn(3, 3), torch.randn(2, 32, 3)
    whole = torch.zeros(2, 32, 8)
    whole[..., :3] = error @ matrix
    found = KeyReaders.of(row, slice(0, 3), matrix).loss(error, slice(2, 34))
    assert found == pytest.approx(KeyReaders.of(row).loss(whole, slice(2, 34))) and found > 0


def test_small_errors_lose_what_the_first_order_says() -> None:
    torch.manual_seed(0)
    attention = (random(4, 8), random(2, 8), random(2, 5), random(4, 5), CAUSAL, SINKS, RECENT)
    error = 1e-3 * random(2, 8)
    assert KeyReaders.of(RowAttention(*attention)).loss(error, slice(None)) == pytest.approx(
        first_order(attention, error), rel=1e-2
    )


def test_where_each_token_sees_one_other_the_first_order_is_nothing_and_the_loss_is_not() -> None:
    torch.manual_seed(0)
    q, k, v, slope = 300 * random(2, 8), 300 * random(2, 8), random(2, 5), random(2, 5)
    attention = (q, k, v, slope, CAUSAL, SINKS, RECENT)
    error = 0.3 * random(2, 8) * k.std()
    assert KeyReaders.of(RowAttention(*attention)).loss(error, slice(None)) > 0.1
    assert first_order(attention, error) < 1e-4


def test_readers_of_a_long_row_are_few_and_spread_over_all_that_reads_from_storage() -> None:
    q, k, v, slope = (torch.randn(1, 400, 8) for _ in range(4))
    readers = KeyReaders.of(RowAttention(q, k, v, slope, CAUSAL, 64, 128)).readers
    assert len(readers) == READERS
    assert (readers[0], readers[-1]) == (192, 399)


ALIKE = Precision(8, 32, 4), Precision(4, 32, 4), Precision(2, 32, 4), Precision(16)
TIERED = Precision.of_tiers((8, 4, 2, 2), 32, 4)


def tally(first_order: tuple[float, ...], read_again: dict[int, float]) -> tuple[Tally, dict[Precision, float]]:
    """Of two rows, and what is lost to first order."""
    found = Tally(ALIKE, Axis.TOKENS, read_again=read_again)
    found.sensitivity = {
        candidate: torch.full((1, 2), loss / 2) for candidate, loss in zip(ALIKE, first_order, strict=True)
    }
    return found, found.losses(2) | {TIERED: 0.01}


def test_where_softmax_is_saturated_losses_are_those_of_reading_again() -> None:
    found, losses = tally((1e-9, 1e-6, 40.0, 0.0), {8: 0.2, 4: 0.4, 2: 1.0})
    expected = dict(zip((*ALIKE, TIERED), (0.1, 0.2, 20.0, 0.0, (0.2 + 0.4 + 1.0 + 1.0) / 8), strict=True))
    assert found.where_saturated(losses, 2) == pytest.approx(expected)


@pytest.mark.parametrize("read_again", [{8: 2e-3, 4: 3e-1, 2: 40.0}, {8: 0.0, 4: 0.0, 2: 0.0}, {}])
def test_elsewhere_the_first_order_is_right(read_again: dict[int, float]) -> None:
    found, losses = tally((1e-3, 1e-1, 1.0, 0.0), read_again)
    assert found.where_saturated(losses, 2) == losses


# A model with one layer that cannot be quantized

LAYERS, LOUD = 4, 2
CALIBRATION = torch.randint(3, 128, (4, 256), generator=torch.Generator().manual_seed(3))


def with_a_loud_layer() -> nn.Module:
    """Each token of that layer sees one other alone, and which one it is matters."""
    model = tiny("llama", num_hidden_layers=LAYERS, initializer_range=0.05)
    attention = model.model.layers[LOUD].self_attn
    with torch.no_grad():
        attention.q_proj.weight.mul_(1000)
        attention.k_proj.weight.mul_(1000)
        attention.o_proj.weight.mul_(20)
        model.lm_head.weight.mul_(10)
    return model


def test_keys_that_cannot_be_quantized_stay_as_they_are_and_are_named() -> None:
    model = with_a_loud_layer()
    compiled = applied(model, budget=4.5, calibration=CALIBRATION, sinks=0, recent=32)
    bits = [site.key.mean_bits for site in compiled.kvmix_plan.sites]
    assert bits[LOUD] == 16
    assert max(bits[:LOUD] + bits[LOUD + 1 :]) < 16
    (note,) = compiled.kvmix_report.notes
    assert re.fullmatch(
        rf"model\.layers\.{LOUD}\.self_attn: its keys stay at 16 bits, as .* would lose [\d.e-]+ nats a token", note
    )


def test_where_the_budget_is_too_small_that_is_said_of_the_layer_that_loses_most() -> None:
    with pytest.warns(PredictedLossWarning, match=rf"layers\.{LOUD}\.self_attn: its keys .*choose a larger budget"):
        applied(with_a_loud_layer(), budget=1.5, calibration=CALIBRATION, sinks=0, recent=32)
