"""What a model's own code writes after it was made is told from settings."""

from typing import Any

from torch import nn

from kvmix_compile.passes.untouched.assigned import assigned_names


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.made = None
        self.moved = None

    def set_scale(self, scale: float) -> None:
        self.scale = scale


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Any) -> Any:
        if x is None:
            self.inner.moved = x
        return x

    @classmethod
    def named(cls, name: str) -> type:
        cls.name = name
        return cls


def test_what_methods_assign_is_state_and_what_sets_up_is_not() -> None:
    assert assigned_names(Outer()) == {"moved", "name"}
