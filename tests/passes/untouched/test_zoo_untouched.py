"""After every call of ours, failed ones too, the original is as it was, whatever its forward keeps from run to run."""

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import kvmix_compile
from kvmix_compile import KVMixError
from kvmix_compile.passes.capture.export import logits_of
from tests.helpers.stateful import Keeper, stateful
from tests.helpers.toy_llama import ids

TEXTS = tuple(ids(2, length) for length in (20, 90))


def failing(model: nn.Module) -> None:
    """Fails after everything but the last step."""
    with pytest.raises(KVMixError):
        kvmix_compile.apply(model, budget=0.01, calibration=ids(1, 64))


def compiled(model: nn.Module) -> None:
    small = kvmix_compile.apply(model, budget=3, calibration=ids(1, 64))
    small(TEXTS[0])


CALLS: dict[str, Callable[[nn.Module], object]] = {
    "apply": compiled,
    "analyze": lambda model: kvmix_compile.analyze(model),  # the model writes its own text
    "diagnose": kvmix_compile.diagnose,
    "failing apply": failing,
}


@torch.no_grad()
def logits(model: nn.Module) -> list[Tensor]:
    return [logits_of(model(text)) for text in TEXTS]


def fake_tensors() -> list[FakeTensor]:
    """Those of numbers in the whole process. PyTorch itself holds on to those of the last export."""
    last = torch.ones(1009)
    torch.export.export(nn.ReLU(), (last,))
    gc.collect()
    fakes = [found for found in gc.get_objects() if type(found) is FakeTensor and found.is_floating_point()]
    return [fake for fake in fakes if fake.shape != last.shape]


def assert_untouched(model: nn.Module, before: dict[str, Tensor], answers: list[Tensor]) -> None:
    copied = copy.deepcopy(model)
    now = model.state_dict()
    assert list(now) == list(before)
    for name in before:
        torch.testing.assert_close(now[name], before[name], rtol=0, atol=0)
    for one in (model, copied):
        assert all(torch.equal(a, b) for a, b in zip(logits(one), answers, strict=True))


@pytest.mark.parametrize("call", CALLS)
def test_what_a_forward_keeps_is_put_back(call: str) -> None:
    answers = logits(stateful([Keeper]))
    model = stateful()
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    # These are held, so that their ids are no others'.
    before, fakes = copy.deepcopy(model.state_dict()), fake_tensors()
    CALLS[call](model)
    for module, held in attributes:
        assert all(vars(module)[name] is value or vars(module)[name] == value for name, value in held.items())
        assert all(type(vars(module)[name]) is Tensor for name in vars(module).keys() - held)
    assert not {id(fake) for fake in fake_tensors()} - {id(fake) for fake in fakes}
    assert_untouched(model, before, answers)
    assert_untouched(stateful(), before, answers)
