"""What two processes do with compile=True; test_compiled_ranks.py starts them. Each writes what it saw to
FOLDER/rank-<its number>.pt.
"""

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed

import kvmix_compile
from tests.distributed.two_ranks import OPTIONS, given_by, refused, rows, saved

# Inductor takes its time.
TIME_OUT = timedelta(seconds=200)


def of_failure(model: Any, plan: Any, rank: int) -> str:
    """What is said where Inductor fails in the second process alone."""
    compiles = torch._inductor.compile

    def fails(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("no room for what is compiled")

    torch._inductor.compile = fails if rank == 1 else compiles
    try:
        return refused(lambda: kvmix_compile.apply(model, plan=plan, verify=False, compile=True))
    finally:
        torch._inductor.compile = compiles


def main(folder: Path) -> None:
    distributed.init_process_group("gloo", timeout=TIME_OUT)
    rank = distributed.get_rank()
    model = saved("llama", folder, rank, num_hidden_layers=1)
    as_it_is = kvmix_compile.apply(model, budget=2.3, calibration=rows(2, 160), **OPTIONS)
    compiled = kvmix_compile.apply(model, plan=as_it_is.kvmix_plan, compile=True)
    found = {
        "as it is": given_by(as_it_is),
        "compiled": given_by(compiled),
        "failure": of_failure(model, as_it_is.kvmix_plan, rank),
    }
    torch.save(found, folder / f"rank-{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
