"""Layers: which layers of a model are of the same kind, so that not all need to be captured.

Layers are of one kind where all of this is equal: the names, shapes and dtypes of their parameters and buffers, the
classes of their modules, the plain attributes of these (numbers, strings), and what lists of the model's configuration
that are as long as the model say of them, such as `layer_types`. What counts the layers is left out. It is assumed
that a model treats layers of one kind alike.
"""

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

_PLAIN = (bool, int, float, str, tuple, type(None))


@dataclass(frozen=True)
class Layers:
    """The layers of a model. path: of the list that they are in."""

    path: str
    modules: nn.ModuleList
    per_layer: tuple[list[Any], ...]

    @cached_property
    def kinds(self) -> tuple[Hashable, ...]:
        """Of each layer, equal for layers of one kind."""
        settings = [_settings(layer) for layer in self.modules]
        names = {name for of_layer in settings for name in of_layer}
        counting = {name for name in names if _counts({i: of[name] for i, of in enumerate(settings) if name in of})}
        return tuple(
            (
                _tensors(layer),
                frozenset((name, repr(value)) for name, value in of_layer.items() if name not in counting),
                tuple(repr(values[index]) for values in self.per_layer),
            )
            for index, (layer, of_layer) in enumerate(zip(self.modules, settings, strict=True))
        )

    @cached_property
    def few(self) -> int:
        """So many of the first layers have a layer of each kind among them, and one more, if there is one: two of a
        kind are to be found alike.
        """
        first = [index for index, kind in enumerate(self.kinds) if kind not in self.kinds[:index]]
        return min(first[-1] + 2, len(self.modules))

    @contextmanager
    def shortened(self) -> Iterator[None]:
        """Within, the model has no layers but the first few."""
        left_out = list(self.modules)[self.few :]
        del self.modules[self.few :]
        try:
            yield
        finally:
            self.modules.extend(left_out)

    def place(self, path: str) -> tuple[int, str] | None:
        """In which layer the module of this path is, and where in that; None: in none."""
        head, _, rest = path.removeprefix(f"{self.path}.").partition(".")
        return (int(head), rest) if path.startswith(f"{self.path}.") and head.isdecimal() else None


def find_layers(model: nn.Module) -> Layers | None:
    """The layers of a model: the one list of modules that has as many as its configuration says. None where there are
    several such lists or none, or where layers share parameters.
    """
    config = getattr(model, "config", None)
    if config is None:
        return None
    config = config.get_text_config(decoder=True)
    count = getattr(config, "num_hidden_layers", None)
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    found = [(path, module) for path, module in lists if len(module) == count]
    outermost = [(path, module) for path, module in found if not any(path.startswith(f"{one}.") for one, _ in found)]
    if len(outermost) != 1:
        return None
    (path, modules) = outermost[0]
    parameters = [parameter for layer in modules for parameter in layer.parameters()]
    if len(set(parameters)) < len(parameters):
        return None
    per_layer = [values for values in vars(config).values() if isinstance(values, list) and len(values) == count]
    return Layers(path, modules, tuple(values for values in per_layer if not _counts(dict(enumerate(values)))))


def _tensors(layer: nn.Module) -> Hashable:
    held = (*layer.named_parameters(), *layer.named_buffers())
    return tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in held)


def _settings(layer: nn.Module) -> dict[tuple[str, str], Any]:
    """The classes and plain attributes of a layer's modules."""
    found: dict[tuple[str, str], Any] = {}
    for path, module in layer.named_modules():
        found[path, ""] = type(module)
        found |= {(path, name): value for name, value in vars(module).items() if isinstance(value, _PLAIN)}
    return found


def _counts(values: Mapping[int, Any]) -> bool:
    """Whether what is given of each layer that has it is the number of that layer, from wherever these are counted."""
    if len(values) < 2 or any(type(value) is not int for value in values.values()):
        return False
    return len({value - index for index, value in values.items()}) == 1
