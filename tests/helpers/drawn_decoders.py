"""Drawn decoders: one small decoder for each way of spelling it that hypothesis draws, right or hostile to a cache."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

VOCABULARY, POSITIONS = 64, 400

Factor = Callable[[int, int], object]

# What the hidden states are multiplied by, given the numbers of rows and tokens.
SIZES: dict[str, Factor] = {
    "nothing": lambda rows, tokens: 1.0,
    "the same on both paths": lambda rows, tokens: 1.5 if tokens > 50 else 1.5,
    "one row": lambda rows, tokens: 2.0 if rows == 1 else 1.0,
    "one token": lambda rows, tokens: 2.0 if tokens == 1 else 1.0,
    "a multiple": lambda rows, tokens: 2.0 if tokens % 16 == 0 else 1.0,
    "a product": lambda rows, tokens: 2.0 if rows * tokens > 150 else 1.0,
    "a long text": lambda rows, tokens: 2.0 if tokens > 100 else 1.0,
    "the length": lambda rows, tokens: 1.0 + tokens / 100,
    "a tensor of the length": lambda rows, tokens: torch.where(torch.tensor(tokens) > 70, 2.0, 1.0),
}


@lru_cache
def remembered_mask(tokens: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


def causal(tokens: int, window: int = 0) -> Tensor:
    """Boolean `[tokens, tokens]`."""
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    return mask.triu(1 - window) if window else mask


@dataclass(frozen=True)
class Spelling:
    """How a decoder is written."""

    attention: str
    scale: str
    positions: str
    sizes: str
    state: str
    output: str
    mixing: str
    dtype: torch.dtype
    layers: int
    kv_heads: int
    head_dim: int


SPELLINGS = st.builds(
    Spelling,
    attention=st.sampled_from(
        ["fused causal", "fused mask", "fused additive", "fused window", "masked fill", "where", "added", "baddbmm"]
    ),
    scale=st.sampled_from(["default", "on the queries", "on the scores", "divided", "none"]),
    positions=st.sampled_from(["none", "learned", "sliced table", "rotary", "given", "cumulated"]),
    sizes=st.sampled_from([*["nothing"] * len(SIZES), *SIZES]),
    state=st.sampled_from(["none", "none", "attribute", "buffer", "list", "cached function", "counter"]),
    output=st.sampled_from(["tensor", "tuple", "object"]),
    mixing=st.sampled_from(["none"] * 6 + ["shift", "mean", "first", "far back", "keys again"]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float64]),
    layers=st.integers(1, 2),
    kv_heads=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([8, 16]),
)


class DrawnDecoder(nn.Module):
    """Token ids, int64 `[rows, tokens]`, to logits `[rows, tokens, vocabulary]`, in the way that `spelling` says."""

    HEADS = 4

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.spelling = spelling
        width, kv_width = self.HEADS * spelling.head_dim, spelling.kv_heads * spelling.head_dim
        self.embedding, self.head = nn.Embedding(VOCABULARY, width), nn.Linear(width, VOCABULARY)
        self.learned = nn.Embedding(POSITIONS, width)
        self.table = nn.Parameter(torch.randn(POSITIONS, width))
        self.projections = nn.ModuleList(
            nn.ModuleList([nn.Linear(width, width), nn.Linear(width, kv_width), nn.Linear(width, kv_width)])
            for _ in range(spelling.layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(spelling.layers))
        self.held: list[Tensor] = []
        self.calls = 0

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> object:
        rows, tokens = input_ids.shape
        hidden = self.embedding(input_ids) * SIZES[self.spelling.sizes](rows, tokens)
        hidden = self._with_positions(self._mixed(hidden), input_ids, position_ids)
        for norm, projections in zip(self.norms, self.projections, strict=True):
            hidden = hidden + self._attention(norm(hidden), projections, tokens)
        logits = self.head(hidden)
        return {"tensor": logits, "tuple": (logits, hidden), "object": SimpleNamespace(logits=logits)}[
            self.spelling.output
        ]

    def _mixed(self, hidden: Tensor) -> Tensor:
        match self.spelling.mixing:
            case "shift":
                return hidden + F.pad(hidden[:, :-1], (0, 0, 1, 0))
            case "far back":
                return hidden + F.pad(hidden, (0, 0, 150, 0))[:, : hidden.shape[1]]
            case "mean":
                return hidden + hidden.mean(1, keepdim=True)
            case "first":
                return hidden + hidden[:, :1]
        return hidden

    def _with_positions(self, hidden: Tensor, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        tokens = input_ids.shape[1]
        match self.spelling.positions:
            case "learned":
                return hidden + self.learned(torch.arange(tokens))
            case "sliced table":
                return hidden + self.table[:tokens]
            case "cumulated":
                return hidden + self.learned(torch.ones_like(input_ids).cumsum(1) - 1)
            case "given":
                return hidden + self.learned(torch.arange(tokens)[None] if position_ids is None else position_ids)
        return hidden

    def _mask(self, tokens: int) -> Tensor:
        window = 20 if self.spelling.attention == "fused window" else 0
        match self.spelling.state:
            case "attribute":
                if getattr(self, "made", torch.empty(0)).shape[0] < POSITIONS:
                    self.made = causal(POSITIONS, window)
                return self.made[:tokens, :tokens]
            case "buffer":
                if "kept" not in self._buffers:
                    self.register_buffer("kept", causal(POSITIONS, window), persistent=False)
                return self.kept[:tokens, :tokens]
            case "list":
                if not self.held:
                    self.held.append(causal(POSITIONS, window))
                return self.held[0][:tokens, :tokens]
            case "cached function" if not window:
                return remembered_mask(POSITIONS)[:tokens, :tokens]
            case "counter":
                self.calls += 1
        return causal(tokens, window)

    def _attention(self, hidden: Tensor, projections: nn.ModuleList, tokens: int) -> Tensor:
        spelling, head_dim = self.spelling, self.spelling.head_dim
        query, key, value = (project(hidden).unflatten(-1, (-1, head_dim)).transpose(1, 2) for project in projections)
        if spelling.positions == "rotary":
            query, key = rotated(query, tokens), rotated(key, tokens)
        extra = key.sum() * 0 if spelling.mixing != "keys again" else key.mean(2).mean(1).repeat(1, self.HEADS)[:, None]
        group = self.HEADS // spelling.kv_heads
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        attend = self._fused if spelling.attention.startswith("fused") else self._spelled
        attended = attend(query, key, value)
        return attended.transpose(1, 2).flatten(2) + extra

    def _fused(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scales = {"default": None, "none": 1.0, "on the scores": 0.3, "divided": 0.25, "on the queries": 1.0}
        scale = scales[self.spelling.scale]
        query = query * 0.3 if self.spelling.scale == "on the queries" else query
        if self.spelling.attention == "fused causal":
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
        mask = self._mask(query.shape[2])
        if self.spelling.attention == "fused additive":
            mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)

    def _spelled(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        spelling, mask = self.spelling, self._mask(query.shape[2])
        query = query * 0.3 if spelling.scale == "on the queries" else query
        if spelling.attention == "baddbmm":
            lowest = torch.zeros(mask.shape, dtype=query.dtype).masked_fill(~mask, -1e9)
            flat = (part.flatten(0, 1) for part in (query, key))
            scores = torch.baddbmm(lowest[None], *(part if i == 0 else part.mT for i, part in enumerate(flat)))
            return torch.bmm(scores.softmax(-1), value.flatten(0, 1)).unflatten(0, (-1, self.HEADS))
        scores = query @ key.mT
        if spelling.scale in ("default", "divided"):
            scores = scores / spelling.head_dim**0.5
        elif spelling.scale == "on the scores":
            scores = scores * 0.3
        lowest = torch.finfo(scores.dtype).min
        match spelling.attention:
            case "masked fill":
                scores = scores.masked_fill(~mask, float("-inf"))
            case "where":
                scores = torch.where(mask, scores, lowest)
            case "added":
                scores = scores + torch.zeros(mask.shape, dtype=scores.dtype).masked_fill(~mask, lowest)
        return scores.softmax(-1) @ value


def rotated(states: Tensor, tokens: int) -> Tensor:
    """Rotary position embedding of `[rows, heads, tokens, head_dim]`."""
    half = states.shape[-1] // 2
    frequencies = 100.0 ** (-torch.arange(half, dtype=states.dtype) / half)
    angles = torch.arange(tokens, dtype=states.dtype)[:, None] * frequencies
    first, second = states.chunk(2, -1)
    return torch.cat((first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), -1)
