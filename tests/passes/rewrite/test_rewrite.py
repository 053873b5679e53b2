"""Rewrite: one attend and one append for each site, and nothing left of what they replace."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx

from kvmix_compile.kernels.format.precision import Precision
from kvmix_compile.kernels.format.state import SiteState
from kvmix_compile.passes.capture.captured import Captured
from kvmix_compile.passes.graph.vocabulary import graph_inputs, operation
from kvmix_compile.passes.match.sites import find_sites
from kvmix_compile.passes.rewrite.rewrite import STATE_TENSORS, Rewritten, rewrite
from tests.helpers.stored import RECENT, stored_alike

NAMES = ("llama", "mistral", "gemma2", "phi3", "gpt2", "opt", "gpt_neox", "falcon", "hand_written", "fused_arange")
KEY, VALUE = Precision(3, 32, 4), Precision(2, 16, 16)
# What attention and masks are made of; none of these models uses them for anything else.
REPLACED = {
    "scaled_dot_product_attention", "softmax", "le", "lt", "ge", "gt", "tril", "triu", "masked_fill", "where", "and",
}  # fmt: skip


def rewritten(captured: Captured, key: Precision = KEY, value: Precision = VALUE) -> Rewritten:
    sites = find_sites(captured).matched
    return rewrite(captured, sites, stored_alike(sites, key, value))


def calls(result: Rewritten) -> list[str]:
    return [operation(node) for node in result.module.graph.nodes]


@pytest.mark.parametrize("name", NAMES)
def test_attention_is_replaced_and_its_mask_is_gone(captured, name: str) -> None:
    result = rewritten(captured(name))
    found = calls(result)
    assert found.count("attend") == found.count("append") == len(result.score_functions) == 2
    assert not REPLACED & set(found)
    if captured(name).has_position_input:
        assert "arange" not in found or name in ("gpt_neox", "hand_written")  # frequencies of their rotary positions


def test_where_chunks_are_exact_one_operator_does_both(captured) -> None:
    graph = captured("llama")
    sites = find_sites(graph).matched
    stored = stored_alike(sites, KEY, VALUE)
    exact = rewrite(graph, sites, [replace(kept, exact_chunks=True) for kept in stored])
    assert calls(exact).count("attend_stepwise") == 2
    assert not {"attend", "append"} & set(calls(exact))
    of_both, alone = (
        [node.args for node in result.module.graph.nodes if operation(node) == name]
        for result, name in ((exact, "attend_stepwise"), (rewritten(graph), "attend"))
    )
    assert str(of_both) == str(alone)


@pytest.mark.parametrize("name", NAMES)
def test_new_tokens_are_appended_after_they_were_attended_to(captured, name: str) -> None:
    result = rewritten(captured(name))
    order = [node for node in result.module.graph.nodes if operation(node) in ("attend", "append")]
    assert [operation(node) for node in order] == ["attend", "append"] * 2
    for index, (attend, append) in enumerate(zip(order[::2], order[1::2], strict=True)):
        assert attend.args[1:][:2] == append.args[:2]  # keys and values
        state = [node.name for node in append.args[4:10]]
        assert state == [f"{tensor}_{index}" for tensor in STATE_TENSORS]
        assert attend.args[3:11] == append.args[2:10]  # lengths, starts and state
        assert attend.args[11:14] == append.args[10:13] == (KEY.as_ints(), VALUE.as_ints(), RECENT)


def test_what_a_score_goes_through_is_told_to_the_kernel(captured) -> None:
    def calls(name: str) -> list[fx.Node]:
        return [node for node in rewritten(captured(name)).module.graph.nodes if operation(node) == "attend"]

    (first, second) = calls("gemma2")
    assert first.args[14:] == (pytest.approx(32**-0.5), pytest.approx(4.0), 24)
    assert second.args[14:] == (pytest.approx(32**-0.5), pytest.approx(4.0), 0)
    assert [(node.args[15:], node.kwargs) for node in calls("llama")] == [((0.0, 0), {})] * 2
    assert [(node.args[15:], node.kwargs) for node in calls("mistral")] == [((0.0, 24), {})] * 2
    assert [node.kwargs for node in calls("llama4")] == [{"attention_chunk": 24}] * 3 + [{}]
    for node in calls("gpt_oss"):
        assert operation(node.kwargs["sink_logits"].args[0]) == "get_attr"


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_becomes_inputs(captured, name: str) -> None:
    names = [node.name for node in graph_inputs(rewritten(captured(name)).module.graph)]
    state = [f"{tensor}_{index}" for index in range(2) for tensor in STATE_TENSORS]
    assert names == ["input_ids", "position_ids", "logit_positions", "lengths", "starts", *state]


@pytest.mark.parametrize("name", ["llama", "gpt2", "fused_arange"])
def test_weights_are_the_models_own(captured, name: str) -> None:
    result, model = rewritten(captured(name)), captured(name).model
    assert result.module.get_submodule("model") is model
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in result.module.parameters()} == own
    assert not list(result.module.parameters(recurse=False))


@pytest.mark.parametrize("name", ["llama", "fused_arange", "hand_written"])
def test_the_captured_graph_stays_as_it_was(captured, name: str) -> None:
    graph = captured(name)
    before, ids = str(graph.graph), torch.randint(3, 60, (2, 9))
    given = (ids, torch.arange(9).expand(2, -1), torch.arange(9))
    with torch.no_grad():
        logits = graph.module(*given)
        rewritten(graph)
        assert str(graph.graph) == before
        assert torch.equal(graph.module(*given), logits)


def states(graph: Captured, key: Precision, value: Precision, blocks: int) -> list[SiteState]:
    return [
        SiteState.allocate(stored.layout, 2, blocks, torch.float32)
        for stored in stored_alike(find_sites(graph).matched, key, value)
    ]


def run(result: Rewritten, cache: list[SiteState], ids: Tensor, length: int) -> Tensor:
    every = torch.arange(ids.shape[1])
    tensors = [tensor for state in cache for tensor in state.tensors()]
    lengths, starts = torch.full((2,), length), torch.zeros(2, dtype=torch.int64)
    with torch.no_grad():
        return result.module(ids, (length + every).expand_as(ids), every, lengths, starts, *tensors)


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_prompt_has_the_captured_logits_at_any_precision(captured, name: str) -> None:
    result, ids = rewritten(captured(name)), torch.randint(3, 60, (2, 90))
    every = torch.arange(90)
    with torch.no_grad():
        expected = captured(name).module(ids, every.expand(2, -1), every)
    torch.testing.assert_close(
        run(result, states(captured(name), KEY, VALUE, 4), ids, 0), expected, atol=1e-4, rtol=1e-4
    )


def test_one_token_after_a_prompt_reads_the_cache(captured) -> None:
    result, ids = rewritten(captured("llama"), Precision(16), Precision(16)), torch.randint(3, 60, (2, 90))
    cache = states(captured("llama"), Precision(16), Precision(16), 4)
    whole = run(result, states(captured("llama"), Precision(16), Precision(16), 4), ids, 0)
    run(result, cache, ids[:, :89], 0)
    torch.testing.assert_close(run(result, cache, ids[:, 89:], 89), whole[:, 89:], atol=1e-4, rtol=1e-4)


def with_orders(captured: Captured, key: Precision) -> Rewritten:
    """Each head's channels of the second site in an order of its own, those of the first in the model's."""
    sites = find_sites(captured).matched
    generator = torch.Generator().manual_seed(0)
    order = [torch.randperm(sites[1].key_dim, generator=generator).tolist() for _ in range(sites[1].kv_heads)]
    first, second = stored_alike(sites, key)
    return rewrite(captured, sites, [first, replace(second, channel_order=order)])


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "fused_arange"])
def test_an_order_of_channels_is_put_before_attend_and_append(captured, name: str) -> None:
    result = with_orders(captured(name), Precision(16))
    nodes = {node for node in result.module.graph.nodes if operation(node) in ("attend", "append")}
    first, second = ({node for node in nodes if f"packed_key_{index}" in map(str, node.args)} for index in (0, 1))
    assert len(first) == len(second) == 2
    assert not any("order_channels" in map(operation, node.all_input_nodes) for node in first)
    for node in second:
        ordered = [operation(argument) == "order_channels" for argument in node.args[:3]]
        assert ordered == ([True, True, False] if operation(node) == "attend" else [True, False, False])


@pytest.mark.parametrize("name", ["llama", "falcon", "fused_arange"])
def test_an_order_of_channels_changes_no_logits(captured, name: str) -> None:
    ids = torch.randint(3, 60, (2, 90))
    plain, ordered = rewritten(captured(name), Precision(16), Precision(16)), with_orders(captured(name), Precision(16))
    logits = []
    for result in (plain, ordered):
        cache = states(captured(name), Precision(16), Precision(16), 4)
        logits.append([run(result, cache, part, first) for first, part in ((0, ids[:, :80]), (80, ids[:, 80:]))])
    for expected, found in zip(*logits, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.equal(cache[1].sink_k, states(captured(name), Precision(16), Precision(16), 4)[1].sink_k)
