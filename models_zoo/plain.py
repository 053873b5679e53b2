"""Decoders in plain PyTorch that owe nothing to transformers.

All take token ids, int64 [batch, tokens], and return logits, float32 [batch, tokens, vocabulary].
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvmix_compile.models_zoo.seeding import seeded

ROPE_BASE = 10000.0  # RoFormer, section 3.3


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a plain decoder; `heads` is a multiple of `kv_heads` (equal to it where keys and values are fused)."""

    vocabulary: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    max_positions: int = 512

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


def rotate(states: Tensor, positions: Tensor) -> Tensor:
    """Rotary position embedding (RoFormer) of states [batch, heads, tokens, head_dim] at positions [batch, tokens]."""
    half = states.shape[-1] // 2
    frequencies = ROPE_BASE ** (-torch.arange(half, device=states.device) / half)
    angles = positions[:, None, :, None] * frequencies
    first, second = states.split(half, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class FeedForward(nn.Module):
    """Two linear maps with a GELU between them."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, 2 * config.width, bias=False)
        self.down = nn.Linear(2 * config.width, config.width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(hidden)))


class HandWrittenAttention(nn.Module):
    """Grouped-query attention spelled out: matmul, scale, mask, softmax, matmul."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.query = nn.Linear(config.width, config.heads * config.head_dim, bias=False)
        self.key = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.value = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.output = nn.Linear(config.heads * config.head_dim, config.width, bias=False)

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        batch, tokens, _ = hidden.shape
        head_dim, group = self.config.head_dim, self.config.heads // self.config.kv_heads
        query = rotate(self.query(hidden).view(batch, tokens, -1, head_dim).transpose(1, 2), positions)
        key = rotate(self.key(hidden).view(batch, tokens, -1, head_dim).transpose(1, 2), positions)
        value = self.value(hidden).view(batch, tokens, -1, head_dim).transpose(1, 2)
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)

        scores = torch.matmul(query, key.transpose(-1, -2)) * head_dim**-0.5
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=hidden.device).tril()
        weights = torch.softmax(scores.masked_fill(~causal, float("-inf")), dim=-1)
        return self.output(torch.matmul(weights, value).transpose(1, 2).reshape(batch, tokens, -1))


class HandWrittenBlock(nn.Module):
    """Hand-written attention and a feed-forward network, each behind a norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.attention = HandWrittenAttention(config)
        self.feed_forward_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.feed_forward = FeedForward(config)

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden), positions)
        return hidden + self.feed_forward(self.feed_forward_norm(hidden))


class HandWrittenDecoder(nn.Module):
    """Separate projections, RoPE and hand-written attention; positions default to 0, 1, 2, ..."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(HandWrittenBlock(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, position_ids)
        return self.head(self.norm(hidden))


class FusedAttention(nn.Module):
    """One projection for queries, keys and values, and PyTorch's own attention."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.output = nn.Linear(config.width, config.width)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, tokens, _ = hidden.shape
        qkv = self.qkv(hidden).view(batch, tokens, 3, self.config.heads, self.config.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(mixed.transpose(1, 2).reshape(batch, tokens, -1))


class FusedBlock(nn.Module):
    """Fused attention and a feed-forward network, each behind a norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = FusedAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.width)
        self.feed_forward = FeedForward(config)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden))
        return hidden + self.feed_forward(self.feed_forward_norm(hidden))


class FusedArangeDecoder(nn.Module):
    """Fused projections and learned positions, which it counts itself: there is no position input."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.max_positions, config.width)
        self.layers = nn.ModuleList(FusedBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden = self.embedding(input_ids) + self.positions(positions)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(self.norm(hidden))


class ConvolutionBlock(nn.Module):
    """A causal depthwise convolution over the tokens, then attention: tokens mix in two ways."""

    KERNEL = 4

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(config.width, config.width, self.KERNEL, groups=config.width)
        self.block = FusedBlock(config)

    def forward(self, hidden: Tensor) -> Tensor:
        padded = F.pad(hidden.transpose(1, 2), (self.KERNEL - 1, 0))
        return self.block(hidden + self.convolution(padded).transpose(1, 2))


class ConvolutionDecoder(FusedArangeDecoder):
    """A decoder whose keys and values are not its whole state: the convolution looks back too."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(ConvolutionBlock(config) for _ in range(config.layers))


Decoder = TypeVar("Decoder", bound=nn.Module)

# PyTorch's default weights leave attention nearly uniform, so that logits hardly depend on the context; this much
# larger, scores spread by a few units.
GAIN = 2.5


def _build(decoder: Callable[[DecoderConfig], Decoder], seed: int, overrides: dict[str, Any]) -> Decoder:
    with seeded(seed):
        model = decoder(replace(DecoderConfig(), **overrides))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(GAIN)
    return model.eval()


def hand_written(seed: int = 0, **overrides: Any) -> HandWrittenDecoder:
    """A random HandWrittenDecoder in eval mode; `overrides` are fields of DecoderConfig."""
    return _build(HandWrittenDecoder, seed, overrides)


def fused_arange(seed: int = 0, **overrides: Any) -> FusedArangeDecoder:
    """A random FusedArangeDecoder in eval mode; `overrides` are fields of DecoderConfig."""
    return _build(FusedArangeDecoder, seed, overrides)


def convolution(seed: int = 0, **overrides: Any) -> ConvolutionDecoder:
    """A random ConvolutionDecoder in eval mode; `overrides` are fields of DecoderConfig."""
    return _build(ConvolutionDecoder, seed, overrides)
