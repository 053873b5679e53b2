"""torch.compile(model, backend="kvmix"): positions and masks that are not those of one text in a row."""

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from transformers import StaticCache

from kvmix_compile.errors import CacheError
from tests.helpers.cache_argument import with_cache
from tests.helpers.toy_llama import ids, lossless, original

SLOTS = 96
PROMPT, SEEN = 40, 44  # steps between two whose masks a GPU would look at


@pytest.fixture(autouse=True, scope="module")
def dynamo_begins_anew() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@cache
def compiled() -> nn.Module:
    options = {"plan": lossless().kvmix_plan, "backend": "eager"}
    return torch.compile(original(), backend="kvmix", options=options)


def past() -> StaticCache:
    return StaticCache(original().config, max_cache_len=SLOTS)


def padded(tokens: int) -> Tensor:
    return (torch.arange(tokens) >= torch.tensor([[0], [9]])).long()


def after(steps: int) -> StaticCache:
    """A padded batch that was prompted and has decoded."""
    held, text = past(), ids(2, SLOTS)
    compiled()(text[:, :PROMPT], attention_mask=padded(PROMPT), **with_cache(held))
    for seen in range(PROMPT, PROMPT + steps):
        compiled()(text[:, seen : seen + 1], attention_mask=padded(seen + 1), **with_cache(held))
    return held


POSITIONS: dict[str, Callable[[int], Tensor]] = {
    "begin anew": lambda tokens: torch.arange(tokens) % 17,
    "offset": lambda tokens: torch.arange(tokens) + 100,
    "backwards": lambda tokens: 200 - torch.arange(tokens),
}


@pytest.mark.parametrize("pattern", POSITIONS)
def test_positions_are_the_originals(pattern: str) -> None:
    text, positions = ids(2, SEEN), POSITIONS[pattern](SEEN)[None]
    found = []
    for model in (original(), compiled()):
        held, logits = past(), []
        for part in (slice(0, PROMPT), *(slice(seen, seen + 1) for seen in range(PROMPT, SEEN))):
            logits.append(model(text[:, part], position_ids=positions[:, part], **with_cache(held)).logits)
        found.append(torch.cat(logits, 1))
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)


def texts_apart() -> Tensor:
    mask = torch.zeros(2, 1, 1, SLOTS, dtype=torch.bool)
    mask[..., 20 : SEEN + 1] = True
    return mask


def holed() -> Tensor:
    mask = padded(SEEN + 1)
    mask[0, 12] = 0
    return mask


MASKS: dict[str, Callable[[], Tensor | None]] = {
    "texts told apart by a 4-D mask": texts_apart,
    "a token that is held": holed,
    "none, after padding": lambda: None,
}


@pytest.mark.parametrize("mask", MASKS)
def test_a_step_with_another_mask_is_refused_at_once(mask: str) -> None:
    held = after(SEEN - PROMPT)
    with pytest.raises(CacheError, match="pad on the left"):
        compiled()(ids(2, 1), attention_mask=MASKS[mask](), **with_cache(held))
