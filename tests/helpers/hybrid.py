"""A hybrid written by hand, with a cache of its own: a recurrence and attention, and ways for that to go wrong."""

from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, WIDTH = 128, 32

# Right for any number of tokens; forgets its state where several come at once; forgets it always; is called twice for
# each token; has keys and values of its own; counts tokens in the cache; remembers what it was given.
Kind = Literal["right", "forgets several", "forgets", "is called twice", "keeps keys", "counts", "remembers"]


class Held:
    """The cache: a state, and keys and values."""

    def __init__(self) -> None:
        self.state: Tensor | None = None
        self.seen = 0
        self.kept: dict[str, tuple[Tensor, Tensor]] = {}

    def keys_and_values(self, key: Tensor, value: Tensor, name: str = "") -> tuple[Tensor, Tensor]:
        if name in self.kept:
            key, value = (torch.cat(pair, dim=1) for pair in zip(self.kept[name], (key, value), strict=True))
        self.kept[name] = key, value
        return key, value


class Recurrence(nn.Module):
    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind, self.decay, self.taken = kind, nn.Parameter(torch.rand(WIDTH)), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, cache: Held | None = None) -> Tensor:
        several, state = hidden.shape[1] > 1, hidden.new_zeros(hidden.shape[0], WIDTH)
        forgets = self.kind == "forgets" or (self.kind == "forgets several" and several)
        if cache is not None and cache.state is not None and not forgets:
            state = cache.state
        if self.kind == "remembers":
            self.last = hidden
        outputs = []
        for token in self.taken(hidden).unbind(dim=1):
            state = state * torch.sigmoid(self.decay) + token
            outputs.append(state)
        if cache is not None:
            cache.state = state
            if self.kind == "counts":
                cache.seen += hidden.shape[1]
            if self.kind == "keeps keys":
                cache.keys_and_values(hidden, hidden, "of the recurrence")
        return torch.stack(outputs, dim=1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, hidden: Tensor, cache: Held | None = None) -> Tensor:
        query, key, value = self.query(hidden), self.key(hidden), self.value(hidden)
        if cache is not None:
            key, value = cache.keys_and_values(key, value)
        new, seen = query.shape[1], key.shape[1]
        visible = torch.arange(seen)[None] <= torch.arange(seen - new, seen)[:, None]
        heads = (tensor.unflatten(-1, (2, -1)).transpose(1, 2) for tensor in (query, key, value))
        return F.scaled_dot_product_attention(*heads, attn_mask=visible).transpose(1, 2).flatten(2)


class Hybrid(nn.Module):
    """Ids to logits, in a cache of its own where that is asked for."""

    def __init__(self, kind: Kind = "right") -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.recurrence, self.attention = Recurrence(kind), Attention()
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, cache: Held | None = None, use_cache: bool = False) -> SimpleNamespace:
        cache = Held() if use_cache and cache is None else cache
        hidden = self.embedding(input_ids)
        for _ in range(2 if self.recurrence.kind == "is called twice" else 1):
            hidden = hidden + self.recurrence(hidden, cache=cache)
        hidden = hidden + self.attention(hidden, cache=cache)
        return SimpleNamespace(logits=self.head(hidden), cache=cache)


def hybrid(kind: Kind = "right") -> Hybrid:
    """One with weights that are the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Hybrid(kind).eval()
