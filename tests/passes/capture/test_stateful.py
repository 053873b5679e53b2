"""Modules that carry a state are found by what they do to the model's own cache, and are nodes of their own."""

import pytest
import torch
from torch import nn

from kvmix_compile.models_zoo.tiny import tiny
from kvmix_compile.passes.capture.export import capture, logits_of
from kvmix_compile.passes.capture.held import Mould, item, tensors_held, values_held, with_held
from kvmix_compile.passes.capture.single_nodes import SingleNode
from kvmix_compile.passes.capture.stateful import find_stateful
from kvmix_compile.passes.errors import CaptureError
from tests.helpers.hybrid import WIDTH, Held, Kind, hybrid
from tests.helpers.one_capture import captured_once, zoo


def test_the_innermost_module_that_keeps_a_state_is_found() -> None:
    (found,) = find_stateful(zoo("lfm2"))
    assert (found.path, found.kind, found.stepwise) == ("model.layers.0.conv", "Lfm2ShortConv", False)
    (state,) = found.states
    assert (state.extents, state.dtype) == (("rows", 128, 3), torch.float32)
    assert found.mask == item(1, "attention_mask")


def test_a_cache_of_any_kind_will_do() -> None:
    (found,) = find_stateful(hybrid())
    assert (found.path, found.stepwise, found.carried.row_bytes) == ("recurrence", False, WIDTH * 4)


def test_a_model_of_attention_alone_has_none() -> None:
    assert find_stateful(zoo("llama")) == ()


def test_a_short_window_of_keys_is_no_state() -> None:
    assert find_stateful(tiny("mistral", num_hidden_layers=1, sliding_window=6)) == ()


def test_what_forgets_its_state_is_fed_by_single_tokens() -> None:
    (found,) = find_stateful(hybrid("forgets several"))
    assert found.stepwise


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("forgets", "recurrence carries a state.*as if it had read the text in one go"),
        ("is called twice", "recurrence carries a state.*called 2 times"),
        ("keeps keys", "recurrence carries a state.*beside its state"),
        ("counts", "recurrence carries a state.*what is no tensor"),
        ("remembers", "recurrence carries a state.*attributes of its own"),
    ],
)
def test_what_cannot_be_carried_is_refused_by_name(kind: Kind, said: str) -> None:
    with pytest.raises(CaptureError, match=f"{said}.*backend='kvmix'"):
        find_stateful(hybrid(kind))


def test_the_graph_calls_the_module_and_gives_what_the_model_gives() -> None:
    captured, ids = captured_once(zoo("lfm2")), torch.arange(3, 23)[None]
    (single,) = (child for child in captured.module.children() if isinstance(child, SingleNode))
    assert [node.target for node in captured.graph.nodes if node.op == "call_module"] == ["single_node_0"]
    assert captured.stateful == (single.stateful,)
    with torch.no_grad():
        actual, expected = captured.module(*captured.inputs(ids[0])), zoo("lfm2")(ids).logits
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)


def test_gradients_go_through_the_module() -> None:
    model = zoo("lfm2")
    captured, row = captured_once(model), torch.arange(3, 23)
    embedding = model.get_input_embeddings().weight
    gradients = [
        torch.autograd.grad(logits[0, -1, 5], embedding)[0]
        for logits in (captured.module(*captured.inputs(row)), model(row[None]).logits)
    ]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)


def test_several_tokens_on_a_state_go_in_one_by_one_where_they_must() -> None:
    model, hidden = hybrid("forgets several"), torch.randn(2, 9, WIDTH)
    node = SingleNode(model, *find_stateful(model))
    whole, last = node((None,), None, hidden)
    first, state = node((None,), None, hidden[:, :4])
    kept = state.clone()
    rest, after = node((state,), None, hidden[:, 4:])
    torch.testing.assert_close(torch.cat((first, rest), dim=1), whole)
    torch.testing.assert_close(after, last)
    assert torch.equal(state, kept)


def test_a_module_is_as_it_was_after_capture() -> None:
    model = tiny("lfm2")
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    capture(model)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


def test_a_hook_on_a_module_runs_once() -> None:
    model, calls = hybrid(), list[int]()
    model.recurrence.register_forward_hook(lambda module, given, output: calls.append(1) or 2 * output)
    captured, ids = capture(model), torch.arange(20)[None]
    calls.clear()
    with torch.no_grad():
        actual = captured.module(*captured.inputs(ids[0]))
        torch.testing.assert_close(actual, logits_of(model(ids)))


def test_tensors_are_found_wherever_they_are_held() -> None:
    cache = Held()
    cache.state = torch.ones(1)
    cache.keys_and_values(torch.ones(2), torch.ones(3))
    assert [tensor.numel() for tensor in tensors_held(cache).values()] == [1, 2, 3]
    assert values_held({"a": [1, None, nn.Linear(2, 2)]}) == {item("a", 0): 1, item("a", 1): None}


def test_what_is_held_somewhere_else_is_shared() -> None:
    other = object()
    assert with_held(((1, other), {"a": 2}), {item(1, "a"): 3}) == ((1, other), {"a": 3})


def test_a_mould_makes_copies_that_hold_other_tensors() -> None:
    cache = [Held(), Held()]
    cache[1].state = torch.ones(2)
    (way,) = tensors_held(cache)
    mould, state = Mould.of(cache, [way]), torch.zeros(3)
    copied = mould.filled([state])
    assert copied[1].state is state and copied[1] is not cache[1] and torch.equal(cache[1].state, torch.ones(2))
    assert copied[0] is mould.filled([state])[0]
