"""Leaves out what would take seconds to be collected, and makes Triton's interpreter faster: nothing that it computes
changes.
"""

import math
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    is_left_out = collection_path.name == "test_triton_sweep.py" and "not sweep" in config.option.markexpr
    return True if is_left_out else None


if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.language import core
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    launch, replace_language = interpreter.GridExecutor.__call__, interpreter._patch_lang
    replaced = set[str]()

    def launch_anew(self: Any, *arguments: Any, **options: Any) -> Any:
        replaced.clear()
        return launch(self, *arguments, **options)

    def replace_language_once(function: Any) -> Any:
        """At each call of one function by another Triton would replace all of the language that its module sees."""
        if function.__module__ in replaced:
            return None
        replaced.add(function.__module__)
        return replace_language(function)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = launch_anew, replace_language_once

    of_scalars = cache(interpreter._get_np_dtype)

    def dtype_of(dtype: Any) -> Any:
        """Triton would make a table of all dtypes to look one up."""
        return original_dtype_of(dtype) if dtype.scalar.is_ptr() else of_scalars(dtype.scalar)

    original_dtype_of, interpreter._get_np_dtype = interpreter._get_np_dtype, dtype_of

    operations = {"add": numpy.add, "sub": numpy.subtract, "mul": numpy.multiply}

    def check_overflow(self: Any, left: Any, right: Any, operation: Any) -> None:
        """Triton would compute the limits and the sum as tensors of its own, which takes a third of all time."""
        dtype = left.type.scalar
        if dtype.int_bitwidth < 64:
            wide = operations[operation.__name__](left.handle.data, right.handle.data, dtype=numpy.int64)
            within = (wide >= dtype.get_int_min_value()) & (wide <= dtype.get_int_max_value())
            assert within.all(), f"int{dtype.int_bitwidth} overflow in {operation.__name__}"

    TritonSemantic.binary_op_sanitize_overflow_impl = check_overflow

    @cache
    def size_of(shape: tuple[int, ...]) -> tuple[Any, Any]:
        return core.tuple([core.constexpr(length) for length in shape]), core.constexpr(math.prod(shape))

    def initialize(self: Any, handle: Any, type: Any) -> None:
        """Triton would wrap the lengths of each tensor's shape anew, with their types."""
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = size_of(type.shape if type.is_block() else ())

    core.tensor.__init__ = initialize
