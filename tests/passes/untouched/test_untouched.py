"""Capturing leaves every model of the zoo as it was, and what a forward writes to its own tensors a graph does not."""

import copy
from collections import OrderedDict
from typing import NoReturn

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from kvmix_compile.models_zoo import plain
from kvmix_compile.models_zoo.tiny import DECODERS, SPECIAL, tiny
from kvmix_compile.passes.capture.export import capture, logits_of
from kvmix_compile.passes.errors import CaptureError
from kvmix_compile.passes.untouched.reach import reach
from kvmix_compile.passes.untouched.untouched import untouched
from tests.helpers.stateful import KEEPERS, TableOfLengths, stateful

IDS = torch.randint(3, 128, (2, 60), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", [*DECODERS, *SPECIAL, "hand_written", "fused_arange"])
def test_a_model_of_the_zoo_is_as_it_was(name: str) -> None:
    # Models of its own: generate leaves a mark on those that other tests share.
    model, fresh = (getattr(plain, name)() if hasattr(plain, name) else tiny(name) for _ in range(2))
    capture(model)
    assert list(model.state_dict()) == list(fresh.state_dict())
    assert dict(model.named_buffers()).keys() == dict(fresh.named_buffers()).keys()
    for (_, one), (_, other) in zip(model.named_modules(), fresh.named_modules(), strict=True):
        assert list(vars(one)) == list(vars(other))
    assert not any(isinstance(tensor, FakeTensor) for tensor in reach(model).tensors)
    with torch.no_grad():
        expected = logits_of(fresh(IDS))
        for one in (model, copy.deepcopy(model)):
            torch.testing.assert_close(logits_of(one(IDS)), expected)


def test_long_rope_is_as_it_was_and_its_graph_right() -> None:
    """transformers makes the frequencies of long texts in the first forward, and writes those in use to a buffer."""
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128,
        "short_factor": [1.0] * 16, "long_factor": [1 + i / 2 for i in range(16)],
    }  # fmt: skip
    model, fresh = (tiny("llama", num_hidden_layers=1, rope_parameters=copy.deepcopy(rope)) for _ in range(2))
    graph = capture(model)
    copy.deepcopy(model)
    assert type(model.model.rotary_emb.long_inv_freq) is Tensor
    before = model.model.rotary_emb.inv_freq.clone()
    for tokens in (50, 200):
        positions = torch.arange(tokens)
        text = torch.randint(3, 128, (1, tokens))
        with torch.no_grad():
            found, expected = graph.module(text, positions[None], positions), fresh(text).logits
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(model.model.rotary_emb.inv_freq, before)
        with torch.no_grad():
            torch.testing.assert_close(model(text).logits, expected)
        model.model.rotary_emb.inv_freq.copy_(before)


def test_a_table_of_lengths_is_refused_and_put_back() -> None:
    model = stateful([*KEEPERS, TableOfLengths])
    with pytest.raises(CaptureError):
        capture(model)
    assert model.keepers["TableOfLengths"].table == {} and not hasattr(model.keepers["NewAttribute"], "_gain")
    copy.deepcopy(model)
    model(IDS)


@pytest.mark.parametrize("kind", KEEPERS, ids=lambda kind: kind.__name__)
def test_state_is_put_back_after_a_real_run_and_after_an_error(kind: type) -> None:
    model = stateful([kind])
    before, words = copy.deepcopy(model.state_dict()), {m: dict(vars(m)) for m in model.modules()}
    with pytest.raises(ZeroDivisionError), untouched(model):
        model(IDS)
        raise ZeroDivisionError
    assert {m: dict(vars(m)) for m in model.modules()} == words
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    gains = [tensor for tensor in reach(model).tensors if tensor.shape == (64,) and torch.equal(tensor, _gain())]
    assert not gains


class Registry(OrderedDict[str, Tensor]):
    """As transformers' registries: whatever is asked of it imports what cannot be imported."""

    def __len__(self) -> int:
        return 3

    def _load(self, *arguments: object) -> NoReturn:
        raise ValueError("this class is not there")

    __getitem__ = __iter__ = __contains__ = __setitem__ = keys = values = items = get = update = _load  # type: ignore[assignment]


class KeepsRegistries(plain.HandWrittenDecoder):
    """One that its forward leaves alone, and one that it writes to."""

    def __init__(self, config: plain.DecoderConfig) -> None:
        super().__init__(config)
        self.read, self.written = Registry(), Registry()

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        OrderedDict.__setitem__(self.written, "length", torch.zeros(input_ids.shape[1]))
        return super().forward(input_ids, position_ids)


def test_a_registry_that_cannot_be_asked_is_put_back_without_asking_it() -> None:
    model = KeepsRegistries(plain.DecoderConfig(layers=1)).eval()
    read, written = model.read, model.written
    with untouched(model) as changed:
        model(IDS)
    assert model.read is read and model.written is written
    assert changed.by_owner(written) == {"length"} and not changed.by_owner(read)
    assert not OrderedDict.items(read) and not OrderedDict.items(written)
    capture(model)
    assert not OrderedDict.items(model.written)


class StandIn:
    """As pydantic's, in the place of what is not made yet: whatever it does not have is an error of its own."""

    __slots__ = ("known", "unset")

    def __init__(self) -> None:
        self.known = [1]

    def __getattr__(self, name: str) -> NoReturn:
        raise RuntimeError(f"there is no {name} yet")


def test_what_an_object_does_not_have_is_not_asked_for() -> None:
    model = plain.HandWrittenDecoder(plain.DecoderConfig(layers=1)).eval()
    model.stands_in = StandIn()
    with untouched(model):
        model.stands_in.known, model.stands_in.unset = [2], 3
    assert model.stands_in.known == [1]
    with pytest.raises(RuntimeError):
        model.stands_in.unset  # noqa: B018
    capture(model)


class FirstTextKept(plain.HandWrittenDecoder):
    """Keeps the first text's length and a number that is the same for any."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        if not hasattr(self, "scale"):
            self.scale, self.first = torch.ones(1), torch.zeros(input_ids.shape[1])
            self.register_buffer("saved", torch.ones(1))
        return super().forward(input_ids, position_ids) * self.scale


def test_what_a_first_run_adds_is_made_real_where_it_is_the_same_for_every_text() -> None:
    model = FirstTextKept(plain.DecoderConfig(layers=1)).eval()
    state = list(model.state_dict())
    capture(model)
    assert type(model.scale) is Tensor and model.scale.tolist() == [1.0]
    assert not hasattr(model, "first") and list(model.state_dict()) == state
    copy.deepcopy(model)


def _gain() -> Tensor:
    return torch.linspace(0.5, 1.5, 64)


class WritesToItsWeights(plain.HandWrittenDecoder):
    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        self.head.weight[:1].mul_(1.0)
        return super().forward(input_ids, position_ids)


def test_a_forward_that_writes_to_its_weights_is_refused() -> None:
    model = WritesToItsWeights(plain.DecoderConfig(layers=1)).eval()
    with pytest.raises(CaptureError, match=r"the model's forward writes to head\.weight"):
        capture(model)
