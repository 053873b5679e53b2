"""Places: which layer's keys and values belong to which site, seen on a text that the model and its graph both read."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kvmix_compile.errors import InputError
from kvmix_compile.kernels.format.state import SiteState
from kvmix_compile.passes.capture.signature import caching
from kvmix_compile.passes.graph.rounding import TOLERANCE
from kvmix_compile.passes.rewrite.stored_form import append_to
from kvmix_compile.runtime.cache import KVMixCache
from kvmix_compile.runtime.program import Program
from kvmix_compile.runtime.stand_in import Place, Places, StandIn

# Tokens of the text by which is seen which layer of the model caches what: fewer than any state keeps unquantized.
TOKENS = 12


class _Recording(StandIn):
    """Remembers what each layer would cache."""

    def __init__(self) -> None:
        super().__init__(0)
        self.layers_seen: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if layer_idx in self.layers_seen:
            self.refuse()
        self.layers_seen[layer_idx] = key_states, value_states
        return key_states, value_states


def find_places(model: Any, forward: Callable[..., Any]) -> Places:
    """Where what each layer of the model caches goes, seen on a text that both the model and its graph read.

    Raises InputError where some site caches something else than the model does.
    """
    program: Program = model.kvmix_program
    length = 1 if program.numbering.together else min(TOKENS, program.longest_context or TOKENS)
    ids = program.random_ids(length)
    positions = {"position_ids": torch.arange(length, device=ids.device)[None]} if program.numbering.is_input else {}
    recording, held = _Recording(), KVMixCache(program.format.of_a_trial)
    forward(input_ids=ids, **{program.cache_name: recording}, **caching(forward, True), **positions)
    model.read_ids(ids, held, **positions)
    places: dict[int, list[Place]] = {layer: [] for layer in recording.layers_seen}
    for site, state in enumerate(held.states):
        layer, place = _nearest(recording.layers_seen, site, state, held, program)
        places[layer].append(place)
    if not all(places.values()):
        recording.refuse()
    return {layer: tuple(of_layer) for layer, of_layer in places.items()}


def _nearest(
    cached: Mapping[int, tuple[Tensor, Tensor]], site: int, expected: SiteState, held: KVMixCache, program: Program
) -> tuple[int, Place]:
    """The layer that caches what a site does, and how. Raises InputError where none does."""
    layout, stored = held.layouts[site], program.own_plan.stored_sites()[site]
    best, found, device = TOLERANCE[program.parameter_dtype], None, program.site_devices[site]
    for layer, pair in cached.items():
        for swapped in (False, True):
            key, value = pair[::-1] if swapped else pair
            if key.shape[1:2] + key.shape[3:] + value.shape[3:] != (layout.kv_heads, layout.key_dim, layout.value_dim):
                continue
            state = SiteState.with_room(layout, 1, expected.room, expected.dtype, device)
            none = torch.zeros(1, dtype=torch.int64, device=device)
            append_to(key.to(device), value.to(device), state, none, none, stored)
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
