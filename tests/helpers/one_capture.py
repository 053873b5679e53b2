"""One capture of each model, however many twins are made of it: capturing is most of what apply takes on a tiny one."""

from functools import cache
from typing import Any, TypeVar
from unittest import mock

from torch import nn

import kvmix_compile
from kvmix_compile import Importance, compiler
from kvmix_compile.models_zoo import plain
from kvmix_compile.models_zoo.tiny import RECIPES, tiny
from kvmix_compile.passes.capture.captured import Captured
from kvmix_compile.passes.capture.export import capture

Model = TypeVar("Model", bound=nn.Module)


@cache
def zoo(name: str) -> Any:
    """A model of the zoo by its name. Shared by all tests, which leave it as they found it."""
    return tiny(name) if name in RECIPES else getattr(plain, name)()


@cache
def captured_once(model: nn.Module) -> Captured:
    """The graph of a model that stays as it is; nor is the graph changed."""
    return capture(model)


def applied(model: Model, **options: Any) -> Model:
    """`kvmix_compile.apply` of a model that stays as it is."""
    with mock.patch.object(compiler, "capture", captured_once):
        return kvmix_compile.apply(model, **options)


def analyzed(model: nn.Module, **options: Any) -> Importance:
    """`kvmix_compile.analyze` of a model that stays as it is."""
    with mock.patch.object(compiler, "capture_to_measure", lambda model, _: captured_once(model)):
        return kvmix_compile.analyze(model, **options)
