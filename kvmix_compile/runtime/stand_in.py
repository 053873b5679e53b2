"""Stand-in: what the model's own forward is given for its cache, and where what it would cache goes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import Cache

from kvmix_compile.errors import InputError


@dataclass(frozen=True)
class Place:
    """Where what a layer caches goes. `site`: its number. `swapped`: the site's values are what the layer gives as its
    keys, and the other way round.
    """

    site: int
    swapped: bool = False


# By the number that a layer gives its cache, everything that is kept of it.
Places = Mapping[int, tuple[Place, ...]]


class StandIn(Cache):
    """What the model's own forward is given for its cache, which holds `seen` tokens in each row. It has no layers of
    its own.
    """

    def __init__(self, seen: int) -> None:
        super().__init__(layers=[])
        self.seen = seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions that each row has seen, padding included."""
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Of the keys that `update` gives back: how many there are, and which position the first one has."""
        return self.seen + query_length, 0

    @property
    def is_initialized(self) -> bool:
        """Whether anything is held."""
        return self.seen > 0

    @property
    def is_compileable(self) -> bool:
        """False: nothing is compiled for one call."""
        return False

    def refuse(self, *args: Any, **kwargs: Any) -> Any:
        """Raise InputError: the model asks for what a KVMixCache has no place for."""
        raise InputError(
            "the model keeps more than keys and values of a call like this one, which a KVMixCache has no place for: "
            "call the original model for it"
        )

    get_conv_state = update_conv_state = get_recurrent_state = update_recurrent_state = refuse
    update_indexer = has_previous_state = refuse
