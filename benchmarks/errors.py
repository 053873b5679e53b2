"""What becomes of an error that ends a measurement, and not the run."""

import re

import torch

LONGEST_MESSAGE = 240
# How the message of PyTorch's allocator on CPUs has it: it raises a plain RuntimeError.
CPU_OUT_OF_MEMORY = "can't allocate memory"


def one_line(error: BaseException) -> str:
    """Its type and how its message begins; Dynamo's say little in their first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:LONGEST_MESSAGE]}"


def without_folders(message: str) -> str:
    """The message with files named from their packages on, whatever machine they lie on."""
    return re.sub(r'"[^"]*/site-packages/', '"', message)


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or CPU_OUT_OF_MEMORY in str(error)
