"""A decoder whose forward keeps state from run to run, in every place that Python and PyTorch have. Its logits do not
depend on how often it ran.
"""

import functools
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kvmix_compile.models_zoo.plain import DecoderConfig, HandWrittenDecoder
from kvmix_compile.models_zoo.seeding import seeded


def gain(device: torch.device) -> Tensor:
    """What is kept: float32 `[width]`."""
    return torch.linspace(0.5, 1.5, DecoderConfig().width, device=device)


class Keeper(nn.Module):
    """Makes the gain when it first runs, and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.prepare()

    def prepare(self) -> None:
        """What there is before its first run."""

    def forward(self, device: torch.device, tokens: int) -> Tensor:
        return gain(device)


class NewAttribute(Keeper):
    def forward(self, device: torch.device, tokens: int) -> Tensor:
        if not hasattr(self, "_gain"):
            self._gain = gain(device)
        return self._gain


class AttributeThatWasNone(Keeper):
    def prepare(self) -> None:
        self._gain: Tensor | None = None

    def forward(self, device: torch.device, tokens: int) -> Tensor:
        if self._gain is None:
            self._gain = gain(device)
        return self._gain


class AttributeMadeEachTime(Keeper):
    def forward(self, device: torch.device, tokens: int) -> Tensor:
        self.last = gain(device)
        self.tokens = tokens
        return self.last


class NewBuffer(Keeper):
    def forward(self, device: torch.device, tokens: int) -> Tensor:
        if not hasattr(self, "gain"):
            self.register_buffer("gain", gain(device), persistent=False)
        return self.gain


class ReplacedBuffer(Keeper):
    def prepare(self) -> None:
        self.register_buffer("gain", torch.zeros(DecoderConfig().width))
        self.ready = False

    def forward(self, device: torch.device, tokens: int) -> Tensor:
        if not self.ready:
            self.gain, self.ready = gain(device), True
        return self.gain


class WrittenBuffer(Keeper):
    def prepare(self) -> None:
        self.register_buffer("gain", torch.zeros(DecoderConfig().width))

    def forward(self, device: torch.device, tokens: int) -> Tensor:
        self.gain[: tokens + self.gain.shape[0]].copy_(gain(device))
        return self.gain


class CountingBuffer(Keeper):
    def prepare(self) -> None:
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, device: torch.device, tokens: int) -> Tensor:
        self.calls += 1
        return gain(device)


class WrittenAttribute(Keeper):
    def prepare(self) -> None:
        self.seen = torch.zeros(3)

    def forward(self, device: torch.device, tokens: int) -> Tensor:
        self.seen.add_(1)
        return gain(device)


class Counting(Keeper):
    def prepare(self) -> None:
        self.calls = 0

    def forward(self, device: torch.device, tokens: int) -> Tensor:
        self.calls += 1
        return gain(device)


class CountingTokens(Keeper):
    """The number is a symbol while the model is captured."""

    def prepare(self) -> None:
        self.longest = 0

    def forward(self, device: torch.device, tokens: int) -> Tensor:
        self.longest = tokens
        return gain(device)


class AppendedList(Keeper):
    def prepare(self) -> None:
        self.history: list[Tensor] = []

    def forward(self, device: torch.device, tokens: int) -> Tensor:
        self.history.append(gain(device))
        return self.history[-1]


class Queue(Keeper):
    def prepare(self) -> None:
        self.history: deque[Tensor] = deque(maxlen=2)

    def forward(self, device: torch.device, tokens: int) -> Tensor:
        self.history.append(gain(device))
        return self.history[-1]


class Table(Keeper):
    def prepare(self) -> None:
        self.table: dict[str, list[Tensor]] = defaultdict(list)

    def forward(self, device: torch.device, tokens: int) -> Tensor:
        found = self.table[str(device)]
        if not found:
            found.append(gain(device))
        return found[0]


class Making(OrderedDict[str, Any]):
    """What is looked up is made anew."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key)()


class TableOfFunctions(Keeper):
    def prepare(self) -> None:
        self.makers = Making(gain=lambda: gain(torch.device("cpu")), never=lambda: 1 // 0)

    def forward(self, device: torch.device, tokens: int) -> Tensor:
        made = self.makers["gain"]
        self.makers["gain"] = lambda: made
        return made


class TableOfLengths(Keeper):
    """Such a table takes numbers, so that it cannot be captured for any length."""

    def prepare(self) -> None:
        self.table: dict[int, Tensor] = {}

    def forward(self, device: torch.device, tokens: int) -> Tensor:
        if int(tokens) not in self.table:
            self.table[int(tokens)] = gain(device)
        return self.table[int(tokens)]


class Namespace(Keeper):
    def prepare(self) -> None:
        self.state = SimpleNamespace(gain=None)

    def forward(self, device: torch.device, tokens: int) -> Tensor:
        if self.state.gain is None:
            self.state.gain = gain(device)
        return self.state.gain


class Slot:
    __slots__ = ("gain",)


class Slots(Keeper):
    def prepare(self) -> None:
        self.state = Slot()

    def forward(self, device: torch.device, tokens: int) -> Tensor:
        if not hasattr(self.state, "gain"):
            self.state.gain = gain(device)
        return self.state.gain


class ClassAttribute(Keeper):
    shared: ClassVar[Tensor | None] = None

    def forward(self, device: torch.device, tokens: int) -> Tensor:
        if self.shared is None:
            type(self).shared = gain(device)
        return self.shared


class ClassTable(Keeper):
    shared: ClassVar[dict[torch.device, Tensor]] = {}

    def forward(self, device: torch.device, tokens: int) -> Tensor:
        if device not in self.shared:
            self.shared[device] = gain(device)
        return self.shared[device]


class CachedProperty(Keeper):
    @functools.cached_property
    def gain(self) -> Tensor:
        return gain(torch.device("cpu"))

    def forward(self, device: torch.device, tokens: int) -> Tensor:
        return self.gain


class CachedMethod(Keeper):
    @functools.lru_cache  # noqa: B019
    def gain(self, device: torch.device) -> Tensor:
        return gain(device)

    def forward(self, device: torch.device, tokens: int) -> Tensor:
        return self.gain(device)


_TABLE: dict[torch.device, Tensor] = {}
_BEHIND_DECORATOR: dict[torch.device, Tensor] = {}
_GAIN: Tensor | None = None
_BY_MODEL: weakref.WeakKeyDictionary[nn.Module, Tensor] = weakref.WeakKeyDictionary()


class GlobalTable(Keeper):
    def forward(self, device: torch.device, tokens: int) -> Tensor:
        return _TABLE.setdefault(device, gain(device))


class GlobalName(Keeper):
    def forward(self, device: torch.device, tokens: int) -> Tensor:
        global _GAIN
        if _GAIN is None:
            _GAIN = gain(device)
        return _GAIN


class NewGlobalName(Keeper):
    def forward(self, device: torch.device, tokens: int) -> Tensor:
        global _NEW_GAIN
        if "_NEW_GAIN" not in globals():
            _NEW_GAIN = gain(device)
        return _NEW_GAIN


class GlobalWeakTable(Keeper):
    def forward(self, device: torch.device, tokens: int) -> Tensor:
        if self not in _BY_MODEL:
            _BY_MODEL[self] = gain(device)
        return _BY_MODEL[self]


@functools.lru_cache
def _remembered(device: torch.device) -> Tensor:
    return gain(device)


class CachedFunction(Keeper):
    def forward(self, device: torch.device, tokens: int) -> Tensor:
        return _remembered(device)


def _with_attribute(device: torch.device) -> Tensor:
    if not hasattr(_with_attribute, "gain"):
        _with_attribute.gain = gain(device)  # type: ignore[attr-defined]
    return _with_attribute.gain  # type: ignore[attr-defined]


class FunctionAttribute(Keeper):
    def forward(self, device: torch.device, tokens: int) -> Tensor:
        return _with_attribute(device)


class DefaultArgument(Keeper):
    def forward(self, device: torch.device, tokens: int, table: Any = {}) -> Tensor:  # noqa: B006
        return table.setdefault(device, gain(device))


def _closing() -> Callable[[torch.device], Tensor]:
    made: Tensor | None = None

    def close(device: torch.device) -> Tensor:
        nonlocal made
        if made is None:
            made = gain(device)
        return made

    return close


class Closure(Keeper):
    def prepare(self) -> None:
        self.make = _closing()

    def forward(self, device: torch.device, tokens: int) -> Tensor:
        return self.make(device)


class Decorated(Keeper):
    """PyTorch's decorator stands between the model and the function that remembers."""

    @torch.no_grad()
    def forward(self, device: torch.device, tokens: int) -> Tensor:
        return _BEHIND_DECORATOR.setdefault(device, gain(device))


KEEPERS: tuple[type[Keeper], ...] = tuple(kind for kind in Keeper.__subclasses__() if kind is not TableOfLengths)


class Stateful(HandWrittenDecoder):
    """One layer; embeddings are multiplied by the gain, which every keeper must have."""

    def __init__(self, config: DecoderConfig, kinds: Sequence[type[Keeper]]) -> None:
        super().__init__(config)
        self.keepers = nn.ModuleDict({kind.__name__: kind() for kind in kinds})
        self.recorded: list[Tensor] = []
        recorded: list[Tensor] = []
        self.norm.register_forward_hook(lambda module, given, output: recorded.append(output))
        self.layers[0].register_forward_pre_hook(lambda module, given: self.recorded.extend(given))

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        hidden = self.embedding(input_ids)
        gains = [keeper(hidden.device, input_ids.shape[1]) for keeper in self.keepers.values()]
        hidden = hidden * torch.stack(gains).amax(0)
        for layer in self.layers:
            hidden = layer(hidden, position_ids)
        return self.head(self.norm(hidden))


def stateful(kinds: Sequence[type[Keeper]] = KEEPERS) -> Stateful:
    """Random weights, the same for all kinds, in eval mode; what was kept outside of models is forgotten."""
    global _GAIN
    _GAIN = None
    globals().pop("_NEW_GAIN", None)
    for table in (_TABLE, _BEHIND_DECORATOR, _BY_MODEL, ClassTable.shared, vars(_with_attribute)):
        table.clear()
    DefaultArgument.forward.__defaults__[0].clear()  # type: ignore[index]
    for memo in (_remembered, CachedMethod.gain):
        memo.cache_clear()
    ClassAttribute.shared = None
    with seeded(0):
        model = Stateful(DecoderConfig(layers=1), kinds)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(2.5)
    return model.eval()
