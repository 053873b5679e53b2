"""How far logits may be from another's that computes the same."""

import pytest
import torch

from kvmix_compile.passes.graph.rounding import difference


def test_a_difference_is_a_share_of_the_standard_deviation() -> None:
    expected = torch.tensor([[0.0, 2.0], [0.0, 2.0]])
    assert difference(expected + 0.5, expected) == pytest.approx(0.5 / expected.std().item())
    assert difference(expected[:1], expected) == torch.inf


def test_equal_numbers_do_not_differ_though_they_do_not_deviate() -> None:
    assert difference(torch.zeros(2, 3), torch.zeros(2, 3)) == 0.0
