"""Low-rank adapters as peft has them: a layer around the original one, with any number of adapters by name, of which
some are active; they can be disabled, and merged into the layer's weights in place.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

RANK = 4


class LoraLinear(nn.Module):
    def __init__(self, base_layer: nn.Linear, adapters: Sequence[str]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self._active_adapter: str | list[str] = adapters[0]
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        for name in adapters:
            self.lora_A[name] = nn.Linear(base_layer.in_features, RANK, bias=False)
            self.lora_B[name] = nn.Linear(RANK, base_layer.out_features, bias=False)
            self.scaling[name] = 0.5

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @property
    def disable_adapters(self) -> bool:
        return self._disable_adapters

    @property
    def active_adapters(self) -> list[str]:
        return [self._active_adapter] if isinstance(self._active_adapter, str) else self._active_adapter

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled and self.merged:
            self.unmerge()
        self._disable_adapters = not enabled

    def set_adapter(self, names: str | list[str]) -> None:
        self._active_adapter = names

    @torch.no_grad()
    def merge(self) -> None:
        for name in self.active_adapters:
            self.base_layer.weight.data += self._difference(name)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        while self.merged_adapters:
            self.base_layer.weight.data -= self._difference(self.merged_adapters.pop())

    def _difference(self, name: str) -> Tensor:
        return self.lora_B[name].weight @ self.lora_A[name].weight * self.scaling[name]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if not self.merged:
            for name in self.active_adapters:
                if name in self.lora_A:
                    result = result + self.lora_B[name](self.lora_A[name](x)) * self.scaling[name]
        return result


def put_on(model: nn.Module, adapters: Sequence[str] = ("first", "second"), layer: str = "q_proj") -> list[LoraLinear]:
    """Put adapters on each layer of that name, in place; returns them."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for parent in list(model.modules()):
        if isinstance(getattr(parent, layer, None), nn.Linear):
            wrapped = LoraLinear(getattr(parent, layer), adapters).eval()
            for name, parameter in wrapped.named_parameters():
                if "lora" in name:
                    parameter.data.normal_(0.0, 0.3, generator=generator)
            setattr(parent, layer, wrapped)
            found.append(wrapped)
    return found


def take_off(model: nn.Module) -> None:
    """Put the layers themselves back, without their adapters."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoraLinear):
                setattr(parent, name, child.base_layer)
