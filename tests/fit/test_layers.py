"""Which layers are of a kind."""

from typing import Any

import pytest
from torch import nn

from kvmix_compile.fit.layers import Layers, find_layers
from kvmix_compile.models_zoo.tiny import tiny
from tests.helpers.one_capture import zoo


def layers_of(name: str, **overrides: Any) -> Layers:
    found = find_layers(tiny(name, **overrides))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("name", "overrides", "few"),
    [
        ("llama", {"num_hidden_layers": 5}, 2),
        ("llama", {"num_hidden_layers": 1}, 1),
        ("gemma3", {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3}, 3),
        # Some layers alone have an attention that counts its layer.
        ("lfm2", {"num_hidden_layers": 6, "layer_types": ["conv", "conv", "full_attention"] * 2}, 4),
        # The first two layers have no experts.
        ("deepseek_v3", {"num_hidden_layers": 6, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}, 4),
    ],
)
def test_the_first_few_layers_are_of_all_kinds(name: str, overrides: dict[str, Any], few: int) -> None:
    assert layers_of(name, **overrides).few == few


def test_layers_differ_in_what_is_set_of_them() -> None:
    model = tiny("llama", num_hidden_layers=4)
    model.model.layers[2].self_attn.scaling = 0.5
    found = find_layers(model)
    assert found is not None
    first, second, third, fourth = found.kinds
    assert first == second == fourth != third


def test_within_shortened_the_model_has_the_first_few_layers() -> None:
    model = tiny("llama", num_hidden_layers=4)
    whole, found = list(model.model.layers), find_layers(model)
    assert found is not None
    with found.shortened():
        assert list(model.model.layers) == whole[:2]
    assert list(model.model.layers) == whole


def test_layers_are_not_found_where_they_share_weights_or_are_not_told() -> None:
    model = tiny("llama", num_hidden_layers=3)
    model.model.layers[2].mlp = model.model.layers[0].mlp
    assert find_layers(model) is None
    assert find_layers(zoo("hand_written")) is None
    assert find_layers(nn.Linear(1, 1)) is None


def test_places_are_those_of_layers() -> None:
    found = layers_of("llama")
    assert found.place("model.layers.1.self_attn") == (1, "self_attn")
    assert found.place("model.layers.1") == (1, "")
    assert found.place("model.norm") is None
