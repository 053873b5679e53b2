"""The benchmark of budgets that know the context: SmolLM2's weights see what the windows let them, and nothing else
changes.
"""

import torch

from kvmix_compile.passes.match.sites import find_sites
from tests.helpers.benchmark_modules import benchmark
from tests.helpers.one_capture import captured_once, zoo
from tests.helpers.toy_llama import ids

windows = benchmark("windows")


def test_in_a_window_nothing_changes_and_beyond_it_does() -> None:
    original = zoo("llama")
    windowed = windows.with_windows(original, window=24)
    text = ids(1, 40)
    with torch.no_grad():
        expected, found = (model(text, use_cache=False).logits for model in (original, windowed))
    torch.testing.assert_close(found[:, :24], expected[:, :24])
    assert (found[:, 24:] - expected[:, 24:]).abs().amax() > 1e-3


def test_each_sixth_layer_sees_all() -> None:
    model = windows.with_windows(zoo("llama"), window=24)
    kinds = model.config.layer_types
    assert [kind == "full_attention" for kind in kinds] == [
        number % windows.LAYERS_A_FULL_ONE == 0 for number in range(1, len(kinds) + 1)
    ]
    assert [site.shape.window for site in find_sites(captured_once(model)).matched] == [
        0 if kind == "full_attention" else 24 for kind in kinds
    ]
