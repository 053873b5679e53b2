"""CUDA graphs of steps of decoding: when one is recorded and replayed; where there is a GPU, that one can be."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import kvmix_compile
from kvmix_compile import KVMixCache
from kvmix_compile.models_zoo.tiny import tiny
from kvmix_compile.runtime import cuda_graph
from kvmix_compile.runtime.cuda_graph import Recorded, Replaying
from tests.helpers.toy_llama import RECENT, SINKS, ids, quantized


class Recorder:
    """Stands for a GPU: what it records works on the very tensors it was recorded with, as a CUDA graph does on their
    addresses.
    """

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(
        self, step: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], state: Sequence[Tensor]
    ) -> Recorded:
        self.recorded += 1
        own = [tensor.clone() for tensor in inputs]
        outputs = step(*own, *(kept.clone() for kept in state))

        def replay() -> None:
            self.replayed += 1
            for output, new in zip(outputs, step(*own, *state), strict=True):
                output.copy_(new)

        return Recorded(own, outputs, replay)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(cuda_graph, "record", recorder)
    return recorder


class Decoder:
    """A compiled toy model and its twin, whose steps are replayed."""

    def __init__(self) -> None:
        self.model = quantized()
        module = self.model.kvmix_program.rewritten.module
        self.replaying = Replaying(lambda *tensors: (module(*tensors),))

    def cache(self, rollback: int = 0) -> KVMixCache:
        """As large from the beginning as on a GPU."""
        return KVMixCache(replace(self.model.kvmix_program.format, begins_whole=True), rollback)

    def step(self, past: KVMixCache, token: Tensor) -> Tensor:
        """As the model does it."""
        past.begin(len(token), 1)
        position, last = past.lengths[:, None].clone(), torch.zeros(1, dtype=torch.int64)
        given = (token, position, last, past.lengths, torch.zeros_like(past.lengths))
        (logits,) = self.replaying(given, past.tensors())
        past.advance(1, given[-1])
        return logits


def same_state(one: KVMixCache, other: KVMixCache) -> bool:
    pairs = zip(one.tensors(), other.tensors(), strict=True)
    return one.lengths.equal(other.lengths) and all(torch.equal(first, second) for first, second in pairs)


def test_replayed_steps_are_the_models_as_the_cache_grows(recorder: Recorder) -> None:
    decoder, text, rooms = Decoder(), ids(2, 160), set()
    past, own = decoder.cache(), decoder.cache()
    for cache in (past, own):
        decoder.model(text[:, :30], past_key_values=cache)
    kept = []
    for token in text[:, 30:].split(1, dim=1):
        expected = decoder.model(token, past_key_values=past).logits
        kept.append((decoder.step(own, token), expected))
        rooms.add(own.states[0].blocks)
    # At the end, so that what a later replay overwrote would show.
    for found, expected in kept:
        assert torch.equal(found, expected)
    assert same_state(own, past)
    assert recorder.recorded == len(rooms) >= 4
    assert recorder.replayed == 130 - len(rooms)


def test_rows_that_change_places_and_caches_in_turn(recorder: Recorder) -> None:
    decoder = Decoder()
    caches = [decoder.cache(rollback=4) for _ in range(4)]
    for cache, seed in zip(caches, (1, 2, 1, 2), strict=True):
        decoder.model(ids(2, 50, seed), past_key_values=cache)
    for number, token in enumerate(ids(2, 60).split(1, dim=1)):
        turn = number // 5 % 2
        past, own = caches[turn], caches[turn + 2]
        for cache in (past, own):
            if number % 7 == 0:
                cache.reorder_cache(torch.tensor([1, 0]))
            if number % 11 == 0:
                cache.crop(-3)
        assert torch.equal(decoder.step(own, token), decoder.model(token, past_key_values=past).logits)
        assert same_state(own, past)
    assert 0 < recorder.recorded < recorder.replayed < 60


def test_nothing_is_recorded_where_rows_change_places_at_every_step(recorder: Recorder) -> None:
    decoder = Decoder()
    past = decoder.cache()
    decoder.model(ids(2, 50), past_key_values=past)
    before = past.tensors()  # held, so that no address is used again
    for token in ids(2, 10).split(1, dim=1):
        past.reorder_cache(torch.tensor([1, 0]))
        before += past.tensors()
        decoder.step(past, token)
    assert recorder.recorded == 0


def test_where_nothing_can_be_recorded_steps_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> Recorded:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(cuda_graph, "record", fail)
    decoder, text = Decoder(), ids(2, 10)
    past, own = decoder.cache(), decoder.cache()
    with pytest.warns(UserWarning, match="without a CUDA graph, .*: operation not permitted$") as warned:
        for token in text.split(1, dim=1):
            assert torch.equal(decoder.step(own, token), decoder.model(token, past_key_values=past).logits)
    assert len(warned) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama").cuda()
    plain = kvmix_compile.apply(model, budget=2.3, calibration=ids(2, 128), sinks=SINKS, recent=RECENT)
    compiled = kvmix_compile.apply(model, plan=plain.kvmix_plan, verify=False, compile=True)
    recorded, really = [], cuda_graph.record
    monkeypatch.setattr(cuda_graph, "record", lambda *call: recorded.append(really(*call)) or recorded[-1])
    text = ids(2, 160).cuda()
    caches = KVMixCache(plain), KVMixCache(compiled)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for part in text.split([30, *[1] * 130], dim=1):
            expected, found = (
                of(part, past_key_values=past).logits for of, past in zip((plain, compiled), caches, strict=True)
            )
            torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)
    assert len(recorded) >= 4
