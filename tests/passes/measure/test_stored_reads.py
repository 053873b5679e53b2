"""How reads of stored keys and values change the loss: as autograd says of leaves that only those reads see."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvmix_compile.passes.match.masks import Mask, ScoreFunction
from kvmix_compile.passes.measure.stored_reads import JointReads, RowAttention, stored_reads

TOKENS, SINKS, RECENT = 20, 3, 6
CAUSAL = ScoreFunction(0.3, 0.0, Mask("causal"))


def random(heads: int, dim: int) -> Tensor:
    return torch.randn(heads, TOKENS, dim)


def by_autograd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    function: ScoreFunction,
    sinks: int,
    recent: int,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """One query at a time: old keys and values come from leaves of their own."""
    stored_k, stored_v = k.clone().requires_grad_(), v.clone().requires_grad_()
    shared = q.shape[0] // k.shape[0]
    total = torch.zeros(())
    with torch.enable_grad():
        for head in range(q.shape[0]):
            for token in range(TOKENS):
                first, size = 0, function.mask.size
                if function.mask.kind != "causal":
                    first = max(0, token - size + 1) if function.mask.kind == "sliding" else token // size * size
                read = range(first, token + 1)
                old = [sinks <= other <= token - recent for other in read]
                keys, values = (
                    torch.stack(
                        [(stored if is_old else fresh)[head // shared, u] for u, is_old in zip(read, old, strict=True)]
                    )
                    for stored, fresh in ((stored_k, k), (stored_v, v))
                )
                scores = keys @ q[head, token] * function.scale
                if function.softcap:
                    scores = function.softcap * torch.tanh(scores / function.softcap)
                if function.slopes:
                    scores = scores + function.slopes[head % len(function.slopes)] * (torch.tensor([*read]) - token)
                weights = scores.exp()
                sink = 0 if sink_logits is None else sink_logits[head].exp()
                total = total + (weights / (weights.sum() + sink) @ values) @ slope[head, token]
        return torch.autograd.grad(total, (stored_k, stored_v))


@pytest.mark.parametrize(
    "function",
    [
        CAUSAL,
        ScoreFunction(0.3, 1.5, Mask("causal")),
        ScoreFunction(0.3, 0.0, Mask("sliding", 9)),
        ScoreFunction(0.3, 0.0, Mask("chunked", 9)),
        ScoreFunction(0.3, 0.0, Mask("causal"), (0.2,)),
        ScoreFunction(0.3, 1.5, Mask("sliding", 9), (0.5, 0.1, 0.2, 0.05, 0.3, 0.0)),
    ],
    ids=["causal", "softcap", "sliding", "chunked", "a slope", "softcap, sliding and slopes"],
)
@pytest.mark.parametrize(("sinks", "recent"), [(SINKS, RECENT), (0, 1), (0, 0)])
@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize("with_sink_logits", [False, True])
def test_they_are_autograds(
    function: ScoreFunction, sinks: int, recent: int, shared: int, with_sink_logits: bool
) -> None:
    torch.manual_seed(0)
    function = replace(function, slopes=function.slopes[: 2 * shared])
    q, k, v, slope = random(2 * shared, 8), random(2, 8), random(2, 5), random(2 * shared, 5)
    options = (function, sinks, recent, torch.randn(2 * shared) if with_sink_logits else None)
    found = stored_reads(RowAttention(q, k, v, slope, *options))
    for reads, expected in zip(found, by_autograd(q, k, v, slope, *options), strict=True):
        torch.testing.assert_close(reads.gradient(), expected, rtol=1e-4, atol=1e-5)
        error = torch.randn(expected.shape)
        changes = reads.changes(error, slice(None))
        torch.testing.assert_close(changes.sum((1, 2)), (error * expected).sum(1), rtol=1e-4, atol=1e-4)


def test_of_values_that_are_keys_too_both_reads_add_up() -> None:
    torch.manual_seed(0)
    value, beside, slope = random(2, 5), random(2, 8), random(6, 5)
    row = RowAttention(random(6, 13), torch.cat([value, beside], dim=-1), value, slope, CAUSAL, SINKS, RECENT)
    of_keys, of_values = by_autograd(row.query, row.key, value, slope, CAUSAL, SINKS, RECENT)
    scored, weighed = stored_reads(row)
    matrix, error = torch.randn(5, 5), torch.randn(2, TOKENS, 5)
    reads = JointReads((scored.of_channels(slice(0, 5)), weighed)).of_turned(matrix)
    changes = reads.changes(error, slice(None)).sum((1, 2))
    expected = (error @ matrix * (of_keys[..., :5] + of_values)).sum(1)
    torch.testing.assert_close(changes.sum(-1), expected.sum(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("function", "recent"),
    [(CAUSAL, TOKENS), (ScoreFunction(0.3, 0.0, Mask("sliding", 6)), 6)],
    ids=["short row", "window within the recent tokens"],
)
def test_what_is_never_read_from_storage_has_none(function: ScoreFunction, recent: int) -> None:
    torch.manual_seed(0)
    for reads in stored_reads(
        RowAttention(random(2, 8), random(2, 8), random(2, 5), random(2, 5), function, SINKS, recent)
    ):
        assert not reads.weights.any()


def test_a_token_reads_what_is_behind_it_alone() -> None:
    torch.manual_seed(0)
    for reads in stored_reads(
        RowAttention(random(2, 8), random(2, 8), random(2, 5), random(2, 5), CAUSAL, SINKS, RECENT)
    ):
        read = reads.weights[0, 0] != 0
        token = torch.arange(TOKENS)
        assert torch.equal(read, (token[:, None] - token >= RECENT) & (token >= SINKS))


def test_what_is_stored_turned_is_read_turned() -> None:
    torch.manual_seed(0)
    _, reads = stored_reads(RowAttention(random(2, 8), random(2, 8), random(2, 5), random(2, 5), CAUSAL, SINKS, RECENT))
    matrix, error = torch.randn(5, 5), random(2, 5)
    turned = reads.of_turned(matrix).changes(error, slice(None)).sum(-1)
    torch.testing.assert_close(turned, reads.changes(error @ matrix, slice(None)).sum(-1))


def test_half_precision_is_measured_in_single() -> None:
    torch.manual_seed(0)
    inputs = [random(2, 8).bfloat16() for _ in range(4)]
    found = stored_reads(RowAttention(*inputs, CAUSAL, SINKS, RECENT))
    expected = stored_reads(RowAttention(*(tensor.float() for tensor in inputs), CAUSAL, SINKS, RECENT))
    for reads, others in zip(found, expected, strict=True):
        assert torch.equal(reads.weights, others.weights) and torch.equal(reads.vectors, others.vectors)
        assert reads.weights.dtype == reads.vectors.dtype == torch.float32
