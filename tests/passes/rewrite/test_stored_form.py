"""What is stored of keys and values can be given back."""

import pytest
import torch

from kvmix_compile.kernels.format.precision import Precision
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.kernels.format.state import StateLayout
from kvmix_compile.passes.allocate.plan import StoredSite
from kvmix_compile.passes.rewrite.stored_form import from_stored_form, in_stored_form

LAYOUT = StateLayout(SiteShape(kv_heads=2, key_dim=8, value_dim=16, window=0), Precision(16), Precision(16), 0, 32)
ORDER = [[3, 1, 0, 2, 7, 6, 5, 4], [0, 2, 1, 3, 4, 6, 5, 7]]


@pytest.mark.parametrize(
    "stored",
    [
        StoredSite(LAYOUT),
        StoredSite(LAYOUT, channel_order=ORDER),
        StoredSite(LAYOUT, key_exponents=(2, -1), value_exponents=(0, 3)),
        StoredSite(LAYOUT, ORDER, (2, -1), (0, 3), values_rotated=True),
    ],
)
def test_what_is_given_back_is_what_was_stored(stored: StoredSite) -> None:
    key, value = torch.randn(3, 2, 5, 8), torch.randn(3, 2, 5, 16)
    found = from_stored_form(*in_stored_form(key, value, stored), stored)
    assert torch.equal(found[0], key)
    torch.testing.assert_close(found[1], value)
