"""Hearing: where torchrun started several processes, the first one reads what the user types, and all hear it."""

from collections.abc import Callable
from datetime import timedelta

import torch.distributed as distributed

from kvmix_command.launched import is_first, processes

# A user may think for longer than any computation takes, after which the model's own processes give each other up.
PATIENCE = timedelta(days=7)


def heard_by_all(read: Callable[[], str]) -> Callable[[], str]:
    """What reads a line as `read` does, in the first process, and gives it in all: the line, or EOFError or
    KeyboardInterrupt. To be made, and called, in all of them. `read` itself where there is one process.
    """
    if processes() == 1:
        return read
    group = distributed.new_group(backend="gloo", timeout=PATIENCE)

    def hear() -> str:
        heard = [_outcome(read) if is_first() else ""]
        distributed.broadcast_object_list(heard, src=0, group=group)
        (outcome,) = heard
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    return hear


def _outcome(read: Callable[[], str]) -> str | BaseException:
    try:
        return read()
    except (EOFError, KeyboardInterrupt) as stopped:
        return stopped
