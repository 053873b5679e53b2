"""Sink logits: a learned score of each head beside those of tokens, however the softmax is kept stable."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvmix_compile.passes.graph.vocabulary import as_node, operation
from kvmix_compile.passes.match.masks import Mask, ScoreFunction
from kvmix_compile.passes.match.sites import find_sites
from kvmix_compile.passes.rewrite.rewrite import rewrite
from kvmix_compile.passes.rewrite.verify import verify
from tests.helpers.stored import stored_alike

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Step = Callable[[Tensor], Tensor]
LOGITS = torch.tensor([1.0, -0.5, 2.0, 0.25])


def masked_scores(query: Tensor, key: Tensor) -> Tensor:
    scores = query @ key.transpose(2, 3) * 0.25
    causal = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril()
    return scores.masked_fill(~causal, torch.finfo(scores.dtype).min)


def column(scores: Tensor, logits: Tensor = LOGITS) -> Tensor:
    return logits.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], -1)


def with_sinks(between: Step = lambda joined: joined, after: Step = lambda weights: weights[..., :-1]) -> Attend:
    """Attention with sink logits; `between` is done to scores and column before the softmax, `after` behind it."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = masked_scores(query, key)
        weights = between(torch.cat([scores, column(scores)], dim=-1)).softmax(-1)
        return after(weights) @ value

    return attend


ACCEPTED: dict[str, Attend] = {
    "plain": with_sinks(),
    "less the maximum": with_sinks(lambda joined: joined - joined.max(dim=-1, keepdim=True).values),
    "less the largest": with_sinks(lambda joined: joined - joined.amax(-1, keepdim=True).detach()),
    "in double precision": with_sinks(lambda joined: joined.double(), lambda weights: weights[..., :-1].float()),
    "contiguous": with_sinks(after=lambda weights: weights[:, :, :, :-1].contiguous()),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_they_are_recognised_and_verified(capture_toy, name: str) -> None:
    captured = capture_toy(ACCEPTED[name])
    sites = find_sites(captured)
    assert not sites.refused
    (site,) = sites.matched
    assert site.score_function == ScoreFunction(pytest.approx(0.25), 0.0, Mask("causal"))
    assert site.attention == "causal, sink logits"
    assert verify(captured, sites.matched) < 1e-4


def test_the_graph_before_and_after(capture_toy) -> None:
    captured = capture_toy(ACCEPTED["less the maximum"])
    (site,) = find_sites(captured).matched
    graph = rewrite(captured, (site,), stored_alike((site,))).module.graph
    names = {operation(node) for node in graph.nodes}
    assert {"attend", "append"} <= names and not {"softmax", "max", "cat", "matmul"} & names
    (attend,) = (node for node in graph.nodes if operation(node) == "attend")
    assert as_node(as_node(attend.kwargs["sink_logits"]).args[0]).op == "get_attr"


def constant_column(fill: Step) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = masked_scores(query, key)
        return torch.cat([scores, fill(scores)], dim=-1).softmax(-1)[..., :-1] @ value

    return attend


def column_first(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = masked_scores(query, key)
    return torch.cat([column(scores), scores], dim=-1).softmax(-1)[..., 1:] @ value


def two_columns(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = masked_scores(query, key)
    joined = torch.cat([torch.cat([scores, column(scores)], dim=-1), column(scores)], dim=-1)
    return joined.softmax(-1)[..., :-1][..., :-1] @ value


REFUSED: dict[str, tuple[Attend, str]] = {
    "of the content": (constant_column(lambda scores: scores[..., :1]), "query-key products alone|learned number"),
    "one for all heads": (constant_column(lambda scores: column(scores, LOGITS[:1].expand(4))), "learned number"),
    "computed": (constant_column(lambda scores: column(scores, LOGITS.exp())), "learned number"),
    "by position": (constant_column(lambda scores: torch.zeros_like(scores[..., :1])), "learned number"),
    "scaled together": (with_sinks(lambda joined: joined * 0.5), "bias"),
    "capped together": (with_sinks(lambda joined: joined.tanh()), "bias|soft cap"),
    "another column dropped": (with_sinks(after=lambda weights: weights[..., 1:]), "slice"),
    "weights worked on first": (with_sinks(after=lambda weights: (weights + 1)[..., :-1]), "add"),
    "the first column": (column_first, "slice|learned number"),
    "two columns": (two_columns, "learned number|slice"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_anything_else_is_refused(capture_toy, name: str) -> None:
    attend, reason = REFUSED[name]
    sites = find_sites(capture_toy(attend))
    assert not sites.matched
    for refusal in sites.refused:
        assert any(part in refusal.reason for part in reason.split("|")), refusal.reason


def test_heads_in_another_order_are_refused(capture_toy) -> None:
    sites = find_sites(capture_toy(constant_column(lambda scores: column(scores, LOGITS).flip(1))))
    assert not sites.matched
