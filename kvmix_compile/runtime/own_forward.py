"""Own forward: what a graph does not take, such as images, sound or embeddings, the model's own forward reads.

It computes what it always does: towers, merged embeddings, positions of three rows, masks by which the tokens of an
image see each other. Of its cache it is given a stand-in, which hands the keys and values of each layer on to the
compressed cache, and gives back the past as it is stored. So tokens of one call see each other in full precision and
the past as any later token does, and what follows is decoded by the graph.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from kvmix_compile.errors import CacheError, InputError
from kvmix_compile.kernels.reference import stored as stored_past
from kvmix_compile.passes.capture.signature import caching
from kvmix_compile.passes.rewrite.stored_form import append_to, from_stored_form
from kvmix_compile.runtime.cache import KVMixCache
from kvmix_compile.runtime.padding import Padding, check_padding, note_padding, read_padding
from kvmix_compile.runtime.places import find_places
from kvmix_compile.runtime.positions import count_on
from kvmix_compile.runtime.program import Program
from kvmix_compile.runtime.stand_in import Places, StandIn

Forward = Callable[..., Any]


class _Filling(StandIn):
    """Hands what each layer caches on to a KVMixCache, in which `tokens` more come in each row."""

    def __init__(self, program: Program, places: Places, cache: KVMixCache, padding: Padding, tokens: int) -> None:
        super().__init__(cache.seen)
        self.stored = program.own_plan.stored_sites()
        self.places, self.cache, self.padding, self.tokens = places, cache, padding, tokens
        self.waiting: dict[int, tuple[Tensor, Tensor]] = {}
        self.filled: set[int] = set()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if layer_idx not in self.places or layer_idx in self.filled:
            self.refuse()
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
            self.refuse()
        cache = self.cache
        if self.seen:
            cache.begin(len(self.padding.starts), self.tokens, logits)
            for layer, (key, value) in self.waiting.items():
                self._append(layer, key, value)
        cache.advance(self.tokens, self.padding.starts)
        note_padding(cache, self.padding)

    @cached_property
    def _counts(self) -> list[tuple[Tensor, Tensor]]:
        """For each site, where it is: how many tokens the rows hold, and how much padding leads what comes."""
        lengths, starts = (self.cache.on_sites(counts) for counts in (self.cache.lengths, self.padding.starts))
        return list(zip(lengths, starts, strict=True))

    def _append(self, layer: int, key: Tensor, value: Tensor) -> None:
        for place in self.places[layer]:
            pair = _arranged(key, self.padding), _arranged(value, self.padding)
            append_to(*(pair[::-1] if place.swapped else pair), self.cache.states[place.site],
                    *self._counts[place.site], self.stored[place.site])  # fmt: skip

    def _past(self, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer that are held, `[batch, kv_heads, seen, dim]`."""
        place = self.places[layer][0]
        state, layout = self.cache.states[place.site], self.cache.layouts[place.site]
        dtype = self.cache.format.dtypes[place.site]
        dense = stored_past(state, layout.storage, self._counts[place.site][0], self.seen, dtype)
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
    program.check_length(cache.seen + tokens)
    mask = arguments.get("attention_mask")
    padding = read_padding(mask, cache, batch, tokens, program.device)
    if padding.comes or padding.is_enclosed:
        check_padding(padding, program.rewritten, program.numbering, cache.seen, ends_are_kept=False)
    if program.places is None:
        program.places = find_places(model, forward)
    filling, logits = _Filling(program, program.places, cache, padding, tokens), logits or tokens
    if cache.seen and padding.there_is_some:
        arguments = {**arguments, "attention_mask": _mask_of_held(mask, cache, tokens)}
    try:
        if not cache.seen:
            cache.begin(batch, tokens, logits)
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


def _arranged(vectors: Tensor, padding: Padding) -> Tensor:
    """`[batch, heads, tokens, dim]` by slot, with each row's padding in front."""
    if padding.order is None:
        return vectors
    return vectors.gather(2, padding.order.to(vectors.device)[:, None, :, None].expand_as(vectors))


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
    it did so now, it was told one position for each token, or it cannot be told any.
    """
    if not program.numbering.is_input or (isinstance(given, Tensor) and given.dim() == 2):
        return True
    return len(noted) == 1 and (noted[0] is None or count_on(noted[0], program.numbering, padding, cache, tokens))


def _with_cache(output: Any, filling: _Filling, cache: KVMixCache) -> Any:
    """What a model returned, with the compressed cache in the place of its stand-in."""
    for name in list(output):
        if output[name] is filling:
            output[name] = cache
            return output
    raise CacheError("the model returned no cache, though it filled one: pass use_cache=False")
