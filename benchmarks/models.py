"""Every causal architecture of the installed transformers: `python -m benchmarks.models [--only llama gpt2 ...]`.

Each is made at toy size with random weights and tried in a process of its own (benchmarks.model_trial). Results go to
benchmarks/results/models.json and, as a table, to docs/models.md; `--table` makes the table anew from the results.
With `--only`, results are printed, and written where `--output` says.
"""

import argparse
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from benchmarks.model_table import applied, table
from benchmarks.model_trial import Trial, try_architecture, try_static_cache
from benchmarks.toy_models import architectures
from kvmix_compile.evaluate.records import circumstances, write_json

RESULTS = Path(__file__).parent / "results" / "models.json"
TABLE = Path(__file__).parents[1] / "docs" / "models.md"


def main() -> None:
    options = _options()
    if not options.table:
        start = perf_counter()
        kept = _working(RESULTS) if options.again else {}
        names = options.only or [name for name in architectures() if name not in kept]
        found = {row["model_type"]: row for row in _progress(names, options.processes, options.timeout)}
        rows = [row for _, row in sorted((kept | found).items())]
        record = {"results": rows, "tried": len(found), "seconds": round(perf_counter() - start)}
        record |= circumstances("benchmarks.models", torch.device("cpu"))
        output = options.output or (None if options.only else RESULTS)
        if output:
            write_json(output, record)
    if options.table or not options.only:
        options.page.write_text(table(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", nargs="+", metavar="TYPE", choices=architectures())
    which.add_argument("--again", action="store_true", help="only what did not work in both ways the last time")
    which.add_argument("--table", action="store_true", help="nothing, only make the page from the results there are")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one architecture")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--page", type=Path, default=TABLE)
    return parser.parse_args()


def _working(results: Path) -> dict[str, dict[str, Any]]:
    """What worked in both ways the last time, by model type."""
    rows = json.loads(results.read_text(encoding="utf-8"))["results"]
    return {row["model_type"]: row for row in rows if applied(row) and row["backend"]}


def _progress(names: Sequence[str], processes: int, timeout: float) -> Iterator[dict[str, Any]]:
    for result in _each_in_own_process(names, processes, timeout):
        found = {key: value for key, value in result.items() if value not in (None, (), [])}
        print(json.dumps(found), flush=True)
        yield result


def _each_in_own_process(names: Sequence[str], processes: int, timeout: float) -> Iterator[dict[str, Any]]:
    # The server imports torch and transformers once, and runs nothing itself.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.model_trial"])
    with ThreadPoolExecutor(processes) as threads:
        yield from threads.map(lambda name: _in_own_process(context, name, timeout), names)


def _in_own_process(context: Any, name: str, timeout: float) -> dict[str, Any]:
    rows, ended = _run(context, _try, name, timeout)
    if ended == 0:
        return rows[-1]
    row = rows[-1] if rows else asdict(Trial(name))
    if ended is not None:
        return row | {"failures": (f"the process ended with code {ended}",)}
    if rows and _run(context, _try_static_cache, name, timeout)[1] is None:
        return row | {"static_cache": f"compiled, the original itself has no text after {timeout:g} seconds"}
    return row | {"failures": (f"no result after {timeout:g} seconds",)}


def _run(context: Any, target: Any, name: str, timeout: float) -> tuple[list[dict[str, Any]], int | None]:
    """What `target(name, sender)` sends, and the code that its process ends with; None: it does not in time."""
    deadline, rows = perf_counter() + timeout, list[dict[str, Any]]()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(name, sender))
    process.start()
    sender.close()
    try:
        while receiver.poll(max(0, deadline - perf_counter())):
            rows.append(receiver.recv())
        return rows, None
    except EOFError:
        process.join()
        return rows, process.exitcode
    finally:
        process.kill()
        process.join()


def _try(name: str, sender: Connection) -> None:
    torch.set_num_threads(1)
    for row in try_architecture(name):
        sender.send(row)


def _try_static_cache(name: str, sender: Connection) -> None:
    torch.set_num_threads(1)
    try_static_cache(name)


if __name__ == "__main__":
    main()
