"""Models of the right shapes whose weights take no memory."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from kvmix_compile.fit.weightless import weightless
from tests.helpers.one_capture import zoo


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_it_has_the_shapes_of_the_model_and_its_buffers(name: str) -> None:
    model = zoo(name)
    found = weightless(model.config, torch.float32)
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    assert {name: weight.shape for name, weight in found.named_parameters()} == shapes
    assert not any(weight.any() for weight in found.parameters())
    buffers = dict(found.named_buffers())
    assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers())


def test_all_its_weights_are_one_array_as_large_as_the_largest_matrix() -> None:
    width, vocabulary = 4096, 128256
    config = AutoConfig.for_model("llama", hidden_size=width, vocab_size=vocabulary, num_hidden_layers=3)
    model = weightless(config, torch.bfloat16)
    arrays = {weight.untyped_storage().data_ptr(): weight.untyped_storage() for weight in model.parameters()}
    assert [array.nbytes() for array in arrays.values()] == [2 * width * vocabulary]
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_what_shares_weights_shares_them() -> None:
    model = weightless(AutoConfig.for_model("llama", tie_word_embeddings=True, num_hidden_layers=1), torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_modules_that_are_made_later_have_weights() -> None:
    weightless(zoo("llama").config, torch.float32)
    assert nn.Linear(2, 2).weight.device.type == "cpu"
