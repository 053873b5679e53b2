"""Own forward: what a graph does not take, such as images, sound or embeddings, the model's own forward reads.

It computes what it always does: towers, merged embeddings, positions of three rows, masks by which the tokens of an
image see each other. Of its cache it is given a stand-in, which hands the keys and values of each layer on to the
compressed cache, and gives back the past as it is stored. So tokens of one call see each other in full precision and
the past as any later token does, and what follows is decoded by the graph.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from kvmix_compile.errors import CacheError, InputError
from kvmix_compile.kernels.chunk import Chunk
from kvmix_compile.kernels.format.state import SiteState
from kvmix_compile.kernels.ops import append_arguments
from kvmix_compile.kernels.reference import stored as stored_past
from kvmix_compile.passes.capture.signature import caching
from kvmix_compile.passes.graph.rounding import TOLERANCE
from kvmix_compile.passes.rewrite.stored_form import from_stored_form, in_stored_form
from kvmix_compile.runtime.cache import KVMixCache
from kvmix_compile.runtime.padding import Padding, check_padding, read_padding
from kvmix_compile.runtime.positions import count_on
from kvmix_compile.runtime.program import Program

# Tokens of the text by which is seen which layer of the model caches what: fewer than any state keeps unquantized.
TOKENS = 12

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Place:
    """Where what a layer caches goes. `site`: its number. `swapped`: the site's values are what the layer gives as its
    keys, and the other way round.
    """

    site: int
    swapped: bool = False


# By the number that a layer gives its cache, everything that is kept of it.
Places = Mapping[int, tuple[Place, ...]]


class _StandIn(Cache):
    """What the model's own forward is given for its cache. It has no layers of its own."""

    def __init__(self, seen: int) -> None:
        super().__init__(layers=[])
        self.seen = seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    @property
    def is_initialized(self) -> bool:
        return self.seen > 0

    @property
    def is_compileable(self) -> bool:
        return False

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise InputError(
            "the model keeps more than keys and values of a call like this one, which a KVMixCache has no place for: "
            "call the original model for it"
        )

    get_conv_state = update_conv_state = get_recurrent_state = update_recurrent_state = _refuse
    update_indexer = has_previous_state = _refuse


class _Recording(_StandIn):
    """Remembers what each layer would cache."""

    def __init__(self) -> None:
        super().__init__(0)
        self.layers_seen: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if layer_idx in self.layers_seen:
            self._refuse()
        self.layers_seen[layer_idx] = key_states, value_states
        return key_states, value_states


class _Filling(_StandIn):
    """Hands what each layer caches on to a KVMixCache, in which `tokens` more come in each row."""

    def __init__(self, program: Program, places: Places, cache: KVMixCache, padding: Padding, tokens: int) -> None:
        super().__init__(cache.seen)
        self.stored = program.plan.stored_sites()
        self.places, self.cache, self.padding, self.tokens = places, cache, padding, tokens
        self.waiting: dict[int, tuple[Tensor, Tensor]] = {}
        self.filled: set[int] = set()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if layer_idx not in self.places or layer_idx in self.filled:
            self._refuse()
        if key_states.shape[2] != self.tokens:
            raise InputError(
                f"the model makes {key_states.shape[2]} tokens of the {self.tokens} that it was given, and a "
                "KVMixCache holds a text slot by slot: call the original model for it"
            )
        self.filled.add(layer_idx)
        if not self.seen:  # nothing is held that what is written now could take the place of
            self._append(layer_idx, key_states, value_states)
            return key_states, value_states
        self.waiting[layer_idx] = key_states, value_states
        past = self._past(layer_idx)
        return torch.cat([past[0], key_states], dim=2), torch.cat([past[1], value_states], dim=2)

    def finish(self, logits: int) -> None:
        """Count the tokens, once every layer has handed on what it caches. `logits`: as of KVMixCache.begin."""
        if self.filled != self.places.keys():
            self._refuse()
        cache = self.cache
        if self.seen:
            cache.begin(len(self.padding.starts), self.tokens, self.padding.starts.device, logits)
            for layer, (key, value) in self.waiting.items():
                self._append(layer, key, value)
        cache.advance(self.tokens, self.padding.starts)
        cache.every_row_goes_on = not self.padding.ends_a_row
        cache.padded = cache.padded or self.padding.there_is_some

    def _append(self, layer: int, key: Tensor, value: Tensor) -> None:
        for place in self.places[layer]:
            pair = _arranged(key, self.padding), _arranged(value, self.padding)
            _append(*(pair[::-1] if place.swapped else pair), self.cache.states[place.site], self.cache.lengths,
                    self.padding.starts, self.stored[place.site])  # fmt: skip

    def _past(self, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer that are held, `[batch, kv_heads, seen, dim]`."""
        place = self.places[layer][0]
        state, layout = self.cache.states[place.site], self.cache.layouts[place.site]
        dense = stored_past(state, layout.storage, self.cache.lengths, self.seen)
        key, value = from_stored_form(*dense, self.stored[place.site])
        return (value, key) if place.swapped else (key, value)


def read(model: Any, forward: Forward, cache: KVMixCache, arguments: Mapping[str, Any], logits: int) -> Any:
    """What `forward`, that of the original on its twin `model`, returns for `arguments`, with `cache` in the place of
    its own. `logits`: how many of the last tokens' are asked for; 0: all.

    Raises InputError, or CacheError for a mask, where it cannot be; the cache is then as it was.
    """
    program: Program = model.kvmix_program
    if program.plan.exact_chunks:
        raise InputError(
            "with exact_chunks every token reads earlier ones as they are stored, and what is no text is read in one "
            "go: apply(exact_chunks=False), or call the original model for it"
        )
    given = arguments.get("inputs_embeds") if arguments.get("input_ids") is None else arguments["input_ids"]
    if given is not arguments.get("inputs_embeds", given):
        raise InputError("input_ids and inputs_embeds are both given: pass the ones or the others")
    if not isinstance(given, Tensor) or given.dim() not in (2, 3) or given.numel() == 0:
        raise InputError("neither input_ids nor inputs_embeds are given: pass [batch, tokens] with one token at least")
    batch, tokens = given.shape[:2]
    if program.longest_context is not None and cache.seen + tokens > program.longest_context:
        raise InputError(
            f"{cache.seen + tokens} tokens are more than the {program.longest_context} positions that the model has: "
            "shorten the prompt, or continue with a new cache"
        )
    mask = arguments.get("attention_mask")
    padding = read_padding(mask, cache, batch, tokens, given.device)
    if padding.comes or padding.is_enclosed:
        check_padding(padding, program.rewritten, program.numbering, False)
    if program.places is None:
        program.places = find_places(model, forward)
    filling, logits = _Filling(program, program.places, cache, padding, tokens), logits or tokens
    if cache.seen and padding.there_is_some:
        arguments = {**arguments, "attention_mask": _mask_of_held(mask, cache, tokens)}
    try:
        if not cache.seen:
            cache.begin(batch, tokens, given.device, logits)
        with _noted_positions(model) as noted:
            own = {program.cache_name: filling, **caching(forward, True)}
            output = forward(**arguments, return_dict=True, **own)
        counts_on = _counts_on(arguments.get("position_ids"), noted, program, padding, cache, tokens)
        filling.finish(logits)
    except BaseException:
        if not filling.seen:
            cache.reset()
        raise
    cache.counts_on = cache.counts_on and counts_on
    return _with_cache(output, filling, cache)


def find_places(model: Any, forward: Forward) -> Places:
    """Where what each layer of the model caches goes, seen on a text that both the model and its graph read.

    Raises InputError where some site caches something else than the model does.
    """
    program: Program = model.kvmix_program
    length = 1 if program.numbering.together else min(TOKENS, program.longest_context or TOKENS)
    ids = torch.randint(program.vocabulary, (1, length), generator=torch.Generator().manual_seed(0)).to(program.device)
    positions = {"position_ids": torch.arange(length, device=ids.device)[None]} if program.numbering.is_input else {}
    recording, held = _Recording(), KVMixCache(model)
    forward(input_ids=ids, **{program.cache_name: recording}, **caching(forward, True), **positions)
    model.read_ids(ids, held, **positions)
    places: dict[int, list[Place]] = {layer: [] for layer in recording.layers_seen}
    for site, state in enumerate(held.states):
        layer, place = _nearest(recording.layers_seen, site, state, held, program)
        places[layer].append(place)
    if not all(places.values()):
        recording._refuse()
    return {layer: tuple(of_layer) for layer, of_layer in places.items()}


def _nearest(
    cached: Mapping[int, tuple[Tensor, Tensor]], site: int, expected: SiteState, held: KVMixCache, program: Program
) -> tuple[int, Place]:
    """The layer that caches what a site does, and how. Raises InputError where none does."""
    layout, stored = held.layouts[site], program.plan.stored_sites()[site]
    best, found = TOLERANCE[program.parameter_dtype], None
    for layer, pair in cached.items():
        for swapped in (False, True):
            key, value = pair[::-1] if swapped else pair
            if key.shape[1:2] + key.shape[3:] + value.shape[3:] != (layout.kv_heads, layout.key_dim, layout.value_dim):
                continue
            state = SiteState.allocate(layout, 1, expected.blocks, program.dtypes[site], program.device)
            none = torch.zeros(1, dtype=torch.int64, device=program.device)
            _append(key, value, state, none, none, stored)
            share = _difference(state, expected)
            if share <= best:
                best, found = share, (layer, Place(site, swapped))
    if found is None:
        raise InputError(
            f"what the model's own forward caches is not what is cached of {program.plan.sites[site].layer}, so the "
            "two cannot take turns in reading a text: pass input_ids alone, or call the original model for it"
        )
    return found


def _difference(state: SiteState, expected: SiteState) -> float:
    """How far apart the unquantized keys and values of two states are, as a share of their size."""
    parts = ("sink_k", "recent_k", "sink_v", "recent_v")
    one, other = (torch.cat([getattr(it, name).float().flatten() for name in parts]) for it in (state, expected))
    return ((one - other).norm() / other.norm()).item()


def _append(key: Tensor, value: Tensor, state: SiteState, lengths: Tensor, starts: Tensor, stored: Any) -> None:
    key, value = in_stored_form(key, value, stored)
    chunk = Chunk(key=key, value=value, lengths=lengths, starts=starts)
    torch.ops.kvmix.append(*append_arguments(chunk, state, stored.layout.storage))


def _arranged(vectors: Tensor, padding: Padding) -> Tensor:
    """`[batch, heads, tokens, dim]` by slot, with each row's padding in front."""
    if padding.order is None:
        return vectors
    return vectors.gather(2, padding.order[:, None, :, None].expand_as(vectors))


def _mask_of_held(mask: Tensor | None, cache: KVMixCache, tokens: int) -> Tensor:
    """A mask with the padding of earlier calls in front of each row, as the past is given back."""
    assert mask is not None  # where there is padding
    slots = torch.arange(cache.seen, device=mask.device)
    held = slots >= (cache.seen - cache.lengths.to(mask.device))[:, None]
    return torch.cat([held.to(mask.dtype), mask[:, -tokens:]], dim=1)


@contextmanager
def _noted_positions(model: nn.Module) -> Iterator[list[Tensor | None]]:
    """The positions that the model's decoder is given while it runs."""
    noted: list[Tensor | None] = []

    def note(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments
        noted.append(given.get("position_ids", given.get("kwargs", {}).get("position_ids")))

    find: Any = getattr(model, "get_decoder", None)
    decoder = find() if find is not None else None
    if not isinstance(decoder, nn.Module) or decoder is model:
        yield noted
        return
    handle = decoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield noted
    finally:
        handle.remove()


def _counts_on(
    given: object, noted: list[Tensor | None], program: Program, padding: Padding, cache: KVMixCache, tokens: int
) -> bool:
    """Whether the tokens that follow are numbered by counting the slots, as the model does where it reads text alone:
    it did so now, or it was told one position for each token.
    """
    if isinstance(given, Tensor) and given.dim() == 2:
        return True
    return len(noted) == 1 and (noted[0] is None or count_on(noted[0], program.numbering, padding, cache, tokens))


def _with_cache(output: Any, filling: _Filling, cache: KVMixCache) -> Any:
    """What a model returned, with the compressed cache in the place of its stand-in."""
    for name in list(output):
        if output[name] is filling:
            output[name] = cache
            return output
    raise CacheError("the model returned no cache, though it filled one: pass use_cache=False")
