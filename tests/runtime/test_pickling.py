"""A compiled model is pickled as its original and its plan: weights once, and the same logits again."""

import copy
import io
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch

from kvmix_compile.models_zoo.tiny import tiny
from tests.helpers.one_capture import applied, zoo
from tests.helpers.toy_llama import ids, original, quantized


def saved(model: Any) -> io.BytesIO:
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


WAYS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(saved(model), weights_only=False),
    "another process": lambda model: ForkingPickler.loads(ForkingPickler.dumps(model)),
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_is_the_same_model(way: str) -> None:
    again = WAYS[way](quantized())
    assert type(again).__name__ == "LlamaForCausalLM" and again.kvmix_plan == quantized().kvmix_plan
    assert torch.equal(again(ids(2, 200)).logits, quantized()(ids(2, 200)).logits)
    assert torch.equal(original()(ids(2, 20)).logits, tiny("llama")(ids(2, 20)).logits)


def test_a_plain_module_is_pickled_too() -> None:
    small = applied(zoo("fused_arange"), budget=3, calibration=ids(2, 64))
    assert torch.equal(pickle.loads(pickle.dumps(small))(ids(2, 80)), small(ids(2, 80)))


def test_weights_are_kept_once() -> None:
    assert len(saved(quantized()).getvalue()) < 1.01 * len(saved(original()).getvalue())
    model, small = pickle.loads(pickle.dumps((original(), quantized())))
    assert small.lm_head.weight is model.lm_head.weight


def test_what_was_set_on_a_compiled_model_is_kept() -> None:
    small = copy.copy(quantized())
    small.label, small.generation_config = "mine", copy.deepcopy(small.generation_config)
    small.generation_config.max_new_tokens = 7
    again = pickle.loads(pickle.dumps(small))
    assert again.label == "mine" and again.generation_config.max_new_tokens == 7
    assert not hasattr(quantized(), "label")
