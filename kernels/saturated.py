"""Saturated: in a narrower dtype, with numbers that it cannot hold as the largest that it can."""

import torch
from torch import Tensor


def saturated(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In this floating dtype. Magnitudes beyond its largest number become that, infinite ones too; NaN stays NaN."""
    largest = torch.finfo(dtype).max
    return (tensor.clamp(-largest, largest) if largest < torch.finfo(tensor.dtype).max else tensor).to(dtype)
