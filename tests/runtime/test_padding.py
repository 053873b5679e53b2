"""What is asked of a device about a mask: nothing while rows decode, and still no wrong mask goes unseen."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvmix_compile import KVMixCache
from kvmix_compile.errors import CacheError
from kvmix_compile.runtime import padding as padding_module
from kvmix_compile.runtime.padding import read_padding
from tests.helpers.toy_llama import ids, quantized


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padding_module, "reading_waits", lambda device: True)


class Waits(TorchDispatchMode):
    """Counts the numbers read off tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(options or {}))


def masked(*padding: int, tokens: int) -> Tensor:
    return (torch.arange(tokens) >= torch.tensor(padding)[:, None]).long()


def prompted(*padding: int, tokens: int = 40) -> KVMixCache:
    past, rows = KVMixCache(quantized()), len(padding)
    mask = masked(*padding, tokens=tokens)
    quantized()(ids(rows, tokens), attention_mask=mask, past_key_values=past)
    return past


@pytest.mark.usefixtures("on_a_gpu")
def test_decoding_does_not_wait() -> None:
    past, waited = prompted(0, 15), []
    for tokens in range(41, 110):
        with Waits() as waits:
            padding = read_padding(masked(0, 15, tokens=tokens), past, 2, 1, torch.device("cpu"))
        assert padding.starts.tolist() == [0, 0]
        quantized()(ids(2, 1), attention_mask=masked(0, 15, tokens=tokens), past_key_values=past)
        waited += [tokens - 1] * (waits.count > 0)
    assert waited == [64, 96]


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("wrong", [lambda mask: mask[1, 50:52].zero_(), lambda mask: mask[0, 3].zero_()])
def test_a_wrong_mask_is_found_within_a_block(wrong: Any) -> None:
    past = prompted(0, 15)
    with pytest.raises(CacheError, match="attention_mask"):
        for tokens in range(41, 90):
            mask = masked(0, 15, tokens=tokens)
            wrong(mask)
            quantized()(ids(2, 1), attention_mask=mask, past_key_values=past)
    assert past.seen == 64


@pytest.mark.usefixtures("on_a_gpu")
def test_rows_that_have_not_begun_are_looked_at_in_every_step() -> None:
    past = prompted(0, 45)
    for tokens in range(41, 60):
        quantized()(ids(2, 1), attention_mask=masked(0, 45, tokens=tokens), past_key_values=past)
    assert past.lengths.tolist() == [59, 14]
    past = prompted(0, 25, tokens=30)
    past.crop(-10)
    quantized()(ids(2, 1), attention_mask=masked(0, 21, tokens=21), past_key_values=past)
    assert past.lengths.tolist() == [21, 0]


def test_on_a_cpu_every_mask_is_looked_at_first() -> None:
    past, mask = prompted(0, 15), masked(0, 15, tokens=41)
    mask[1, 20] = 0
    before = [tensor.clone() for tensor in past.tensors()]
    with pytest.raises(CacheError, match="masks tokens that the cache already holds"):
        quantized()(ids(2, 1), attention_mask=mask, past_key_values=past)
    assert past.seen == 40 and all(map(torch.equal, past.tensors(), before))
