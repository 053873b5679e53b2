"""KVMixCache: the compressed keys and values of every site, behind transformers' Cache interface."""

import os
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import Cache

from kvmix_compile.errors import CacheError
from kvmix_compile.kernels.ambient import ordinary_tensors
from kvmix_compile.kernels.format.precision import BLOCK_TOKENS
from kvmix_compile.kernels.format.state import Room, SiteState, StateLayout
from kvmix_compile.passes.allocate.plan import Plan, PlanError
from kvmix_compile.passes.capture.single_nodes import nothing_carried
from kvmix_compile.runtime import cache_file
from kvmix_compile.runtime.cache_file import Header
from kvmix_compile.runtime.cache_format import CacheFormat, format_of


class KVMixCache(Cache):
    """The KV cache of one compiled model, for one batch. Empty at first; the model's forward fills it.

    Of each row the first `sinks` tokens and the last `recent` are kept in the model's dtype, all between them
    quantized as the plan says. Rows are independent: the padding that leads a row is not stored.

    Args:
        model: what `kvmix_compile.apply` returned, or the CacheFormat of one.
        rollback: how many tokens `crop` must be able to take back at any time. Each costs one more token per row in the
            model's dtype. Assisted generation raises it by itself, as it needs.
    """

    @ordinary_tensors()
    def __init__(self, model: nn.Module | CacheFormat, rollback: int = 0) -> None:
        super().__init__(layers=[])
        self.format = model if isinstance(model, CacheFormat) else format_of(model)
        if isinstance(rollback, bool) or not isinstance(rollback, int) or rollback < 0:
            raise CacheError(f"rollback is a number of tokens, 0 or more, not {rollback!r}")
        if rollback:
            self._check_nothing_carried(f"rollback={rollback}")
        self._lay_out(rollback)
        self.states: list[SiteState] = []
        # Of each layer that carries a state besides keys and values, its tensors, rows first; empty before the first
        # call. They are never written to, but give way to others.
        self.carried: tuple[tuple[Tensor, ...], ...] = ()
        self.lengths = torch.zeros(0, dtype=torch.int64, device=self.format.device)
        self.seen = 0
        self._furthest = 0
        # What the host knows of the rows without asking the device: that the last slot of each is a token, and whether
        # there may be padding in any.
        self.every_row_goes_on = False
        self.padded = False
        # Whether the model numbers the tokens that follow by counting these: not those behind images, in some models.
        self.counts_on = True
        self.records_past = False
        # While the past is recorded, tokens that may yet be taken back.
        self._unsettled = 0
        # Whether whoever fills this cache reads again what it turns out not to hold, as it does an assistant's.
        self.is_read_again = False

    def _lay_out(self, rollback: int) -> None:
        self.rollback = rollback
        self.layouts = self.plan.layouts(rollback)
        # Sites of one window differ in their precision, not in how many tokens lie where.
        self._layout_of_window = {layout.window: layout for layout in self.layouts}

    # What the model asks of its cache

    def begin(self, batch: int, tokens: int, logits: int = 0) -> None:
        """Make room for `tokens` more tokens in each of `batch` rows. The last `logits` are those that the next tokens
        are chosen by, and may be taken back where the past is recorded.

        Allocates on the first call; grows later, the more the longer the text is.
        """
        self.check_batch(batch)
        if self.records_past:
            self._unsettled += logits
            self._allow(self._unsettled)
        of_window = {window: self._room(layout, tokens) for window, layout in self._layout_of_window.items()}
        rooms = [of_window[layout.window] for layout in self.layouts]
        if not self.states:
            self._allocate(batch, rooms)
            return
        for state, room in zip(self.states, rooms, strict=True):
            if state.recent_k.is_inference():  # a copy, or unpickled, that was made in inference mode
                state.make_ordinary()
            if not state.room.covers(room):
                state.grow(room)

    def _room(self, layout: StateLayout, tokens: int = 0) -> Room:
        """That of a site's state, for `tokens` more than each row holds."""
        return layout.room(self.seen + tokens, self.format.begins_whole)

    def run(
        self, graph: Callable[..., Any], inputs: Sequence[Any], starts: Tensor, tokens: int, logits: int = 0
    ) -> Tensor:
        """The logits that a rewritten graph gives for `inputs` and this cache, which then holds `tokens` more in each
        row, without the padding that leads them: `starts`, int64 `[batch]`. `logits`: as of `begin`.
        """
        self.begin(len(starts), tokens, logits)
        given = graph(*inputs, self.lengths, starts, *self.tensors(), *self._carried_in())
        if self.format.carried:
            given, *after = given
            states = iter(after)
            self.carried = tuple(tuple(islice(states, len(one.tensors))) for one in self.format.carried)
        self.advance(tokens, starts)
        return given

    def _carried_in(self) -> list[Any]:
        """What is carried, as the graph takes it: None for each tensor before the first call."""
        if not self.carried:
            return nothing_carried(self.format.carried)
        return [tensor for layer in self.carried for tensor in layer]

    def _check_nothing_carried(self, asked: str) -> None:
        """Raise CacheError for what would take tokens back."""
        if self.format.carried:
            raise CacheError(
                f"{asked} takes tokens back, and {self.format.carrying_layers} carries a state from token to token, "
                "which cannot be taken back: keep a copy.deepcopy of the cache to return to, or read the text again "
                "into a new one"
            )

    def check_batch(self, batch: int) -> None:
        """Raise CacheError for another number of rows than are held."""
        if self.states and batch != self.batch_size:
            raise CacheError(
                f"the cache holds {self.batch_size} rows and was given {batch}: use a new KVMixCache for another "
                "batch, or batch_select_indices and batch_repeat_interleave to change the rows"
            )

    def holds_padding(self) -> bool:
        """Whether any row saw padding. The device is asked where rows that did may have gone."""
        self.padded = self.padded and bool((self.lengths != self.seen).any())
        return self.padded

    @ordinary_tensors()
    def _allocate(self, batch: int, rooms: Sequence[Room]) -> None:
        kept = zip(self.layouts, rooms, self.format.dtypes, self.format.site_devices, strict=True)
        self.states = [SiteState.with_room(layout, batch, room, dtype, device) for layout, room, dtype, device in kept]
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=self.format.device)

    def on_sites(self, tensor: Tensor) -> list[Tensor]:
        """What a tensor holds, on the device of each site in turn: moved once to each device."""
        devices = self.format.site_devices
        moved = {device: tensor.to(device) for device in dict.fromkeys(devices)}
        return [moved[device] for device in devices]

    def _allow(self, rollback: int) -> None:
        """See to it that so many of the coming tokens can be taken back, and all that could be before."""
        if rollback <= self.rollback:
            return
        # At least twice as many, so that it seldom happens; and by whole blocks, so that what was lost stays known.
        more = -(-(max(rollback, 2 * self.rollback) - self.rollback) // BLOCK_TOKENS) * BLOCK_TOKENS
        before = self.layouts
        self._lay_out(self.rollback + more)
        if not self.states:
            return
        beyond = self._furthest - self.seen
        for state, old, new, lengths in zip(
            self.states, before, self.layouts, self.on_sites(self.lengths), strict=True
        ):
            state.widen(old, new, lengths, lengths + beyond, self._room(new))
        # As if so many more tokens had been held: where there is room for them, the same ones have been overwritten.
        self._furthest += more

    def tensors(self) -> list[Tensor]:
        """The state as the rewritten graph takes it: six tensors a site."""
        return [tensor for state in self.states for tensor in state.tensors()]

    @ordinary_tensors()
    def advance(self, tokens: int, starts: Tensor) -> None:
        """Count `tokens` more positions, of which `starts[row]` were padding."""
        self.seen += tokens
        self._furthest = max(self._furthest, self.seen)
        self.lengths = self.lengths + tokens - starts

    # Kept in a file

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything the cache holds as a safetensors file, which `load` reads: a prompt that many texts begin
        with is read once. Where a model's weights are spread over processes, all of them call it, and each writes a
        file of its own: of "prompt.safetensors" the first of two writes "prompt-00001-of-00002.safetensors".

        Raises CacheError where the file cannot be written; what was at `path` before is then still there.
        """
        ranks = self.format.ranks
        with ranks.together():
            own_path = cache_file.path_of(path, ranks.number, ranks.count)
            cache_file.write(own_path, self._header(), self._named_tensors())

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module) -> Self:
        """The cache that `save` wrote, where the model keeps its own, whatever devices it was saved from.

        Raises CacheError where the file cannot be read, is no cache, is damaged, or was saved from a model of other
        weights, another plan or dtype.
        """
        ranks = format_of(model).ranks
        with ranks.together():
            return cls._loaded(cache_file.path_of(path, ranks.number, ranks.count), model)

    @classmethod
    def _loaded(cls, path: str | os.PathLike[str], model: nn.Module) -> Self:
        """The cache of this process alone."""
        header, tensors = cache_file.read(path)
        cache = cls(model, header.rollback)
        own = cache._header()
        if (header.rank, header.ranks) != (own.rank, own.ranks):
            raise CacheError(
                f"{path} was saved by process {header.rank + 1} of {header.ranks}, and this is process {own.rank + 1} "
                f"of {own.ranks}: keep the names that save gave to the files, and start as many processes"
            )
        try:
            plan = Plan.from_json(header.plan)
        except PlanError as error:
            raise CacheError(f"{path}: {error}") from error
        for kind, saved, expected in (
            ("of another architecture", header.model, own.model),
            ("with another plan", plan, cache.plan),
            ("of another dtype", header.dtypes, own.dtypes),
            ("with other weights", header.weights, own.weights),
        ):
            if saved != expected:
                raise CacheError(
                    f"{path} was saved from a model {kind}, and cannot continue with this one: read its text again "
                    "into KVMixCache(model)"
                )
        try:
            cache._restore(header, tensors)
        except (LookupError, ValueError) as error:
            raise CacheError(f"{path} is damaged: {error}; save the cache again") from error
        return cache

    def _named_tensors(self) -> dict[str, Tensor]:
        held = {f"{site}.{name}": kept for site, state in enumerate(self.states) for name, kept in vars(state).items()}
        held |= {
            f"carried.{layer}.{index}": kept
            for layer, tensors in enumerate(self.carried)
            for index, kept in enumerate(tensors)
        }
        return held | {"lengths": self.lengths}

    def _restore(self, header: Header, tensors: dict[str, Tensor]) -> None:
        """Hold what a file has, named as by `_named_tensors`; LookupError or ValueError where it does not fit."""
        if len(tensors) > 1:  # what was never used has no states
            rows, device = len(tensors["lengths"]), self.format.device
            self._allocate(rows, self._rooms_of(header, tensors))
            self.carried = tuple(
                tuple(torch.empty(sizes.of(rows, 0), dtype=sizes.dtype, device=device) for sizes in one.tensors)
                for one in self.format.carried
            )
        if unknown := sorted(tensors.keys() - self._named_tensors().keys()):
            raise ValueError(f"it holds {unknown[0]}, which this model's caches do not")
        for name, kept in self._named_tensors().items():
            saved = tensors[name]
            if (saved.shape, saved.dtype) != (kept.shape, kept.dtype):
                raise ValueError(f"{name} is {saved.dtype} {list(saved.shape)}, not {kept.dtype} {list(kept.shape)}")
            kept.copy_(saved)
        self.seen, self._furthest, self.counts_on = header.seen, header.furthest, header.counts_on
        self.padded = bool((self.lengths != self.seen).any())

    def _rooms_of(self, header: Header, tensors: dict[str, Tensor]) -> list[Room]:
        """Of each site, as a file has it; LookupError or ValueError where it does not fit."""
        rooms = []
        for site, layout in enumerate(self.layouts):
            room = Room(*(tensors[f"{site}.{part}"].shape[2] for part in ("sink_k", "packed_k", "recent_k")))
            if not (layout.whole(room.blocks).covers(room) and room.covers(layout.required_room(header.seen))):
                raise ValueError(f"the room of site {site} is {tuple(room)}, which is not that of {header.seen} tokens")
            rooms.append(room)
        return rooms

    def _header(self) -> Header:
        return Header(
            model=self.plan.fingerprint,
            weights=self.format.weights,
            plan=self.plan.as_json(),
            dtypes=tuple(map(str, self.format.dtypes)),
            rollback=self.rollback,
            seen=self.seen,
            furthest=self._furthest,
            counts_on=self.counts_on,
            rank=self.format.ranks.number,
            ranks=self.format.ranks.count,
        )

    # What it holds

    @property
    def plan(self) -> Plan:
        """At which precision each site's keys and values are kept."""
        return self.format.plan

    @property
    def nbytes(self) -> int:
        """Bytes that the cache's tensors occupy, room to grow into included."""
        return self._keys_and_values_nbytes + self.carried_nbytes

    @property
    def carried_nbytes(self) -> int:
        """Bytes of what layers carry from token to token besides keys and values."""
        return sum(tensor.nbytes for layer in self.carried for tensor in layer)

    @property
    def _keys_and_values_nbytes(self) -> int:
        return sum(state.nbytes for state in self.states) + self.lengths.nbytes

    @property
    def bits_per_element(self) -> float:
        """Bits occupied for each key or value element of each token that is still attended to: sinks, recent tokens,
        scales and spare room included, and what layers carry besides left out.
        """
        lengths = self.lengths.tolist()
        elements = sum(site.visible_elements(tokens) for site in self.plan.sites for tokens in lengths)
        return 8 * self._keys_and_values_nbytes / elements if elements else 0.0

    # transformers' interface

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions that each row has seen, padding included."""
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """The most tokens there can be: -1, for no limit."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """The name of get_max_length in older transformers, which the next two properties are of as well."""
        return -1

    @property
    def max_cache_len(self) -> int:
        """The most tokens there can be: -1, for no limit."""
        return -1

    @property
    def max_batch_size(self) -> int:
        """Rows; there can be no more than there are."""
        return self.batch_size

    def __len__(self) -> int:
        return len(self.layouts)

    def __repr__(self) -> str:
        return f"KVMixCache({self.batch_size} rows, {self.seen} tokens, {self.nbytes} bytes)"

    @property
    def batch_size(self) -> int:
        """Rows held; 0 before the first call."""
        return self.lengths.shape[0]

    @property
    def is_initialized(self) -> bool:
        """Whether anything was read into the cache yet."""
        return bool(self.states)

    @property
    def is_compileable(self) -> bool:
        """False: `generate` must not compile the twin by itself; see `apply(compile=True)`."""
        return False

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can take tokens back at any time."""
        return self.rollback > 0 or self.records_past

    @property
    def is_sliding(self) -> list[bool]:
        """False of every layer: a window's layout is this cache's own affair."""
        return [False] * len(self)

    @property
    def is_linear(self) -> list[bool]:
        """False of every layer: none has linear attention."""
        return [False] * len(self)

    @property
    def is_dummy(self) -> list[bool]:
        """False of every layer: each holds keys and values."""
        return [False] * len(self)

    def activate_past_recording(self) -> None:
        """From now on, keep unquantized all tokens whose logits were asked for since `crop` was last called, so that
        it can take them back. `rollback` grows as needed. Raises CacheError where layers carry a state besides.
        """
        self._check_nothing_carried("activate_past_recording")
        self.records_past = True

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether `activate_past_recording` was called."""
        return self.records_past

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Always a CacheError: only the compiled model fills its cache."""
        raise CacheError(
            "a KVMixCache is filled by the compiled model that it was made for; pass it to that model, not to the "
            "original one"
        )

    @ordinary_tensors()
    def reset(self) -> None:
        """Forget everything, and give the memory back."""
        self.states, self.carried, self.seen, self._furthest, self._unsettled = [], (), 0, 0, 0
        self.every_row_goes_on = self.padded = False
        self.counts_on = True
        self.lengths = self.lengths.new_zeros(0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was: beam search's choice."""
        self.batch_select_indices(beam_idx)

    @ordinary_tensors()
    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, int64 `[rows]`, in that order."""
        if not self.states:
            return
        for state, of_state in zip(self.states, self.on_sites(indices), strict=True):
            state.select_rows(of_state)
        self.carried = tuple(
            tuple(tensor.index_select(0, indices.to(tensor.device)) for tensor in layer) for layer in self.carried
        )
        self.lengths = self.lengths[indices.to(self.lengths.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        rows = torch.arange(self.batch_size, device=self.lengths.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))

    @ordinary_tensors()
    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens of every row (a positive number: all beyond that many, as
        older transformers call it).

        Raises CacheError where tokens would have to be restored that exist only in quantized form; `rollback`
        prevents that, or `activate_past_recording`. Where layers carry a state besides keys and values, for any.
        """
        self._unsettled = 0
        tokens_to_remove = int(tokens_to_remove)  # a tensor, by older transformers
        removed = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.seen - tokens_to_remove)
        if removed == 0 or not self.states:
            return
        self._check_nothing_carried(f"crop({tokens_to_remove})")
        before, after = self.lengths.tolist(), (self.lengths - removed).clamp(min=0).tolist()
        # Tokens since taken back overwrote older ones, too.
        taken_back = self._furthest - self.seen
        for held, left in zip(before, after, strict=True):
            if not all(layout.can_shorten(held + taken_back, left) for layout in self._layout_of_window.values()):
                if self.is_read_again:
                    self.reset()
                    return
                raise CacheError(
                    f"cannot take back {removed} tokens: of those before them some are kept in quantized form only, or "
                    f"not at all. Make the cache with KVMixCache(model, rollback={removed})"
                )
        self.lengths = torch.tensor(after, dtype=torch.int64, device=self.lengths.device)
        self.seen = max(0, self.seen - removed)
        self.every_row_goes_on = not self.padded
