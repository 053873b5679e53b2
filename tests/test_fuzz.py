"""apply over drawn forwards: a twin at 16 bits is equal to the model, whole and through the cache, or it is refused."""

import copy
import os

import torch
from hypothesis import HealthCheck, Phase, event, given, settings
from torch import Tensor, nn

import kvmix_compile
from kvmix_compile import KVMixCache
from kvmix_compile.errors import KVMixError
from kvmix_compile.passes.capture.export import logits_of
from tests.helpers.drawn_decoders import SPELLINGS, VOCABULARY, DrawnDecoder, Spelling

# KVMIX_FUZZ=500 draws as many, other ones each time.
EXAMPLES = int(os.environ.get("KVMIX_FUZZ", 0))

CALLS = ((2, 48), (1, 33), (1, 1), (3, 1), (1, 128), (5, 64), (2, 250), (7, 30))
CHUNKS = ((70, 1, 1, 60, 1), (3, 200, 1, 1))


def drawn(spelling: Spelling) -> nn.Module:
    torch.manual_seed(0)
    return DrawnDecoder(spelling).eval().to(spelling.dtype)


def ids(rows: int, tokens: int) -> Tensor:
    return torch.randint(VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(tokens))


def assert_same(found: Tensor, expected: Tensor, what: object) -> None:
    difference = ((found - expected).abs().max() / expected.std()).item()
    assert difference < 1e-3, f"{what}: {difference} standard deviations off"


@settings(
    max_examples=EXAMPLES or 12,
    derandomize=not EXAMPLES,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],  # what is drawn is small as it is, and each try takes a second
)
@given(spelling=SPELLINGS)
@torch.no_grad()
def test_a_twin_is_equal_or_refused(spelling: Spelling) -> None:
    model, untouched = drawn(spelling), drawn(spelling)
    try:
        small = kvmix_compile.apply(model, budget=16, calibration=ids(1, 64), sinks=4, recent=32)
    except KVMixError as error:
        event(f"refused: {type(error).__name__}")
        small = None
    for rows, tokens in CALLS:
        text = ids(rows, tokens)
        expected = logits_of(untouched(text))
        assert_same(logits_of(model(text)), expected, f"the original of {rows}, {tokens}")
        if small is not None:
            assert_same(logits_of(small(text)), expected, f"{rows} rows of {tokens} tokens")
    copy.deepcopy(model)
    if small is None:
        return
    event("equal")
    for chunks in CHUNKS:
        text, past = ids(2, sum(chunks)), KVMixCache(small)
        found = [small(part, cache=past).logits for part in text.split(list(chunks), dim=1)]
        assert_same(torch.cat(found, 1), logits_of(untouched(text)), f"in chunks of {chunks}")
