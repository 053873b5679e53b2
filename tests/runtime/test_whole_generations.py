"""Whole lives of a cache, as hypothesis makes them up: any decoder, any plan and batch, read in any chunks, taken back,
reordered, copied and kept in a file in between.

Whatever happened, each row is held to a replay: its own tokens, alone and without padding, in a new cache. What a chunk
sees of the past is what was stored before it, so a replay reads in the same chunks; of one that was taken back in part,
the part that was kept, as no token sees later ones.

In float64 rounding differs too little to turn a code, so what is packed is the same to the byte. In float32, on the
kernels that models run on, a code may turn: that is held to a share of the logits. Where nothing is quantized, the
logits are also those of the original model on the whole text.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kvmix_compile import KVMixCache, Plan
from kvmix_compile.compiler import Found, build, find_in
from kvmix_compile.errors import CacheError
from kvmix_compile.kernels.format.precision import (
    BIT_WIDTHS,
    BLOCK_TOKENS,
    SCALE_BIT_WIDTHS,
    TIERS,
    Axis,
    Precision,
)
from kvmix_compile.kernels.format.state import ENDLESS, packed_blocks
from kvmix_compile.models_zoo import plain
from kvmix_compile.models_zoo.tiny import tiny
from kvmix_compile.passes.allocate.plan import SitePlan
from kvmix_compile.passes.capture.export import logits_of
from kvmix_compile.passes.match.sites import AttentionSite
from kvmix_compile.report import Report
from tests.helpers.one_capture import captured_once, zoo
from tests.helpers.toy_llama import unquantized

ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: tiny("llama"),
    "gemma3": lambda: tiny("gemma3"),
    "mistral": lambda: tiny("mistral", sliding_window=100),  # several blocks of them
    "falcon": lambda: tiny("falcon"),
    "bloom": lambda: tiny("bloom"),  # ALiBi
    "gpt_oss": lambda: tiny("gpt_oss"),  # sink logits, and a window in one of its layers
    "llama4": lambda: tiny("llama4"),  # chunks in some of its layers
    "hand_written": plain.hand_written,
    "fused_arange": plain.fused_arange,
}
NATIVE = ("llama", "gemma3", "mistral", "bloom", "gpt_oss", "llama4")
# ALiBi and sink logits are worked out in float32, whatever the model's dtype.
IN_FLOAT64 = sorted(ARCHITECTURES.keys() - {"bloom", "gpt_oss"})
MOST_ROWS, MOST_TOKENS, MOST_PADDING, MOST_ROLLBACK = 3, 300, 50, 20


@cache
def found(name: str, dtype: torch.dtype) -> tuple[nn.Module, Found]:
    model = zoo(name) if dtype == torch.float32 and name != "mistral" else ARCHITECTURES[name]().to(dtype)
    return model, find_in(captured_once(model), Report(name))


def drawn_precision(draw: Random, head_dim: int, axis: Axis) -> Precision:
    while True:
        bits = draw.choice(BIT_WIDTHS)
        more = [other for other in BIT_WIDTHS[:-1] if other > bits] if axis == Axis.TOKENS else []
        important = draw.choices(more, k=draw.randint(0, 3)) if more else []
        group, scale_bits = draw.choice((8, 16, 32)), draw.choice(SCALE_BIT_WIDTHS)
        precision = Precision(bits, group, scale_bits, tuple(sorted(important, reverse=True)))
        if precision.fits(head_dim, axis):
            return precision


def drawn_plan(draw: Random, sites: Sequence[AttentionSite]) -> Plan:
    planned = []
    for site in sites:
        key = drawn_precision(draw, site.key_dim, Axis.TOKENS)
        value = drawn_precision(draw, site.value_dim, Axis.CHANNELS)
        tiers = [str(channel * TIERS // site.key_dim) for channel in range(site.key_dim)]
        heads = site.kv_heads if key.important_bits else 0
        of_heads = tuple("".join(draw.sample(tiers, len(tiers))) for _ in range(heads))
        planned.append(SitePlan(site.layer, replace(site.shape, window=0), key, value, of_heads))
    return Plan(tuple(planned), "drawn", "", draw.randint(0, 8), draw.randint(32, 40))


@dataclass(frozen=True)
class Chunk:
    """What one row read at once: its tokens `[tokens]`, their logits, and what the row's state then was."""

    tokens: Tensor
    logits: Tensor
    state: list[Tensor]


def state_of(past: KVMixCache, row: int) -> list[Tensor]:
    """What a row's state holds: the sinks, blocks and recent tokens that are read, in order, of every site."""
    length, held = int(past.lengths[row]), []
    for state, layout in zip(past.states, past.layouts, strict=True):
        sinks, blocks = layout.sinks, packed_blocks(length, layout.sinks, layout.recent)
        first_seen = max(0, length - layout.window + 1) if layout.window else 0
        seen = [block % state.blocks for block in range(max(0, first_seen - sinks) // BLOCK_TOKENS, blocks)]
        first_waiting = first_seen if layout.recent == ENDLESS else sinks + BLOCK_TOKENS * blocks
        slots = torch.arange(first_waiting - sinks, max(first_waiting, length) - sinks) % layout.recent_slots
        for precision, sink, packed, ring in (
            (layout.key, state.sink_k, state.packed_k, state.recent_k),
            (layout.value, state.sink_v, state.packed_v, state.recent_v),
        ):
            stored = packed[row][:, seen]
            held += [
                sink[row, :, :length].clone(),
                stored if precision.is_quantized else stored.view(ring.dtype),
                ring[row][:, slots],
            ]
    return held


def shortened(chunks: list[Chunk], removed: int) -> list[Chunk]:
    """Without their last tokens. What the state was after part of a chunk nobody looked at."""
    left = sum(len(chunk.tokens) for chunk in chunks) - removed
    kept = []
    for chunk in chunks:
        if 0 < left < len(chunk.tokens):
            chunk = Chunk(chunk.tokens[:left], chunk.logits[:left], [])
        if left > 0:
            kept.append(chunk)
        left -= len(chunk.tokens)
    return kept


class Life:
    """A cache, and beside it of each row what it must have read: `rows`, as chunks. `padding`: of each row."""

    def __init__(self, name: str, dtype: torch.dtype, draw: Random, lossless: bool) -> None:
        self.original, sites = found(name, dtype)
        plan = drawn_plan(draw, sites.sites)
        self.model = build(self.original, sites, unquantized(plan) if lossless else plan, Report(name))
        self.dtype, self.plan = dtype, self.model.kvmix_plan
        self.rollback, rows = max(0, draw.randint(-5, MOST_ROLLBACK)), draw.randint(1, MOST_ROWS)
        most = 0 if self.model.kvmix_program.rewritten.equal_rows else draw.choice((0, MOST_PADDING))
        self.padding = [draw.randint(0, most) for _ in range(rows)]
        self.past = KVMixCache(self.model, self.rollback)
        self.rows: list[list[Chunk]] = [[] for _ in range(rows)]
        self.furthest = 0
        self.text = torch.Generator().manual_seed(draw.randint(0, 1000))

    def read(self, tokens: int) -> None:
        if self.past.seen + tokens > MOST_TOKENS:
            return
        text = torch.randint(3, 128, (len(self.rows), tokens), generator=self.text)
        seen = self.past.seen + tokens
        mask = torch.arange(seen) >= torch.tensor(self.padding)[:, None]
        options: dict[str, Tensor] = {}
        if any(self.padding):
            options["attention_mask"] = mask.long()
            if self.model.kvmix_program.numbering.is_input:
                options["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -tokens:]
        logits = self.model(text, past_key_values=self.past, use_cache=True, **options).logits
        self.furthest = max(self.furthest, seen)
        for row, chunks in enumerate(self.rows):
            new = mask[row, -tokens:]
            if new.any():
                chunks.append(Chunk(text[row, new], logits[row, new], state_of(self.past, row)))

    def take_back(self, removed: int) -> None:
        """Refused only where more is to be taken back than the cache was made for."""
        before = [state_of(self.past, row) for row in range(len(self.rows))]
        try:
            self.past.crop(-removed)
        except CacheError:
            assert self.furthest - self.past.seen + removed > self.rollback
            assert all(same(then, state_of(self.past, row)) for row, then in enumerate(before))
            return
        self.rows = [shortened(chunks, removed) for chunks in self.rows]
        self.padding = [min(padding, self.past.seen) for padding in self.padding]

    def choose_rows(self, chosen: Sequence[int]) -> None:
        """As beam search does, and whoever is done with some texts."""
        self.past.reorder_cache(torch.tensor(chosen))
        self.rows = [list(self.rows[row]) for row in chosen]
        self.padding = [self.padding[row] for row in chosen]

    def go_on_with_a_copy(self) -> None:
        original, self.past = self.past, copy.deepcopy(self.past)
        for tensor in original.tensors():
            tensor.fill_(1)

    def go_on_from_a_file(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.past.save(Path(folder) / "past.safetensors")
            self.past = KVMixCache.load(Path(folder) / "past.safetensors", self.model)

    def check(self) -> None:
        """Bytes are as predicted; and each row holds what it read: also after tokens were taken back, to the byte what
        it held before they came.
        """
        assert self.past.nbytes == self.plan.cache_bytes(self.furthest, len(self.rows), self.dtype, self.rollback)
        assert self.past.lengths.tolist() == [sum(len(chunk.tokens) for chunk in chunks) for chunks in self.rows]
        for row, chunks in enumerate(self.rows):
            if chunks and chunks[-1].state:
                assert same(state_of(self.past, row), chunks[-1].state)

    def replay(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Of each row its logits and its state, and those of the row alone."""
        for row, chunks in enumerate(self.rows):
            alone = KVMixCache(self.model)
            for chunk in chunks:
                replayed = self.model(chunk.tokens[None], past_key_values=alone, use_cache=True).logits[0]
                yield [chunk.logits], [replayed]
            if chunks:
                yield state_of(self.past, row), state_of(alone, 0)


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(first, second) for first, second in zip(one, other, strict=True))


def lived(name: str, dtype: torch.dtype, seed: int, events: int, lossless: bool = False) -> Life:
    """A life in which so much happened, the seed says what: hypothesis' own lists are too much alike."""
    draw = Random(seed)
    life = Life(name, dtype, draw, lossless)
    life.read(draw.randint(1, 120))
    for _ in range(events):
        match draw.choices(("read", "take back", "rows", "copy", "file"), (10, 6, 2, 1, 1))[0]:
            case "read":
                life.read(draw.choice((1, draw.randint(2, 20), draw.randint(33, 100))))
            case "take back":
                life.take_back(draw.randint(0, life.rollback))
            case "rows":
                life.choose_rows(draw.choices(range(len(life.rows)), k=draw.randint(1, MOST_ROWS)))
            case "copy":
                life.go_on_with_a_copy()
            case "file":
                life.go_on_from_a_file()
        life.check()
    return life


EVENTS, SEEDS = st.integers(8, 16), st.integers(0, 2**32)


@settings(max_examples=40)
@given(name=st.sampled_from(IN_FLOAT64), seed=SEEDS, events=EVENTS)
def test_whatever_happened_each_row_is_what_it_would_be_alone(name: str, seed: int, events: int) -> None:
    for actual, alone in lived(name, torch.float64, seed, events).replay():
        for tensor, expected in zip(actual, alone, strict=True):
            if tensor.dtype == torch.uint8:
                assert torch.equal(tensor, expected)
            else:
                # Llama 4's experts are weighted in float32, whatever the model's dtype.
                torch.testing.assert_close(tensor, expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=20)
@given(name=st.sampled_from(NATIVE), seed=SEEDS, events=EVENTS)
def test_on_the_kernels_that_models_run_on(name: str, seed: int, events: int) -> None:
    for actual, alone in lived(name, torch.float32, seed, events).replay():
        for tensor, expected in zip(actual, alone, strict=True):
            if tensor.is_floating_point():
                assert (tensor - expected).norm() <= 0.05 * expected.norm()


@settings(max_examples=20)
@given(name=st.sampled_from(sorted(ARCHITECTURES)), seed=SEEDS, events=EVENTS)
def test_without_quantization_the_logits_are_the_original_models(name: str, seed: int, events: int) -> None:
    life = lived(name, torch.float32, seed, events, lossless=True)
    for chunks in filter(None, life.rows):
        with torch.no_grad():
            expected = logits_of(life.original(torch.cat([chunk.tokens for chunk in chunks])[None]))[0]
        actual = torch.cat([chunk.logits for chunk in chunks])
        assert (actual - expected).norm() <= 1e-4 * expected.norm()
