"""What is carried out of the kernels as they are compiled for a chip, without a GPU: choices as in every_pair.

`python -m tests.kernels.gpu.compiled` carries out every pair of choices, on both chips, and takes barriers, waits,
fences and predicates out of two kernels one by one. Half an hour of a core: `make ptx`.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import torch
import triton

from kvmix_compile.evaluate.records import circumstances, write_json
from kvmix_compile.kernels.format.precision import Precision
from kvmix_compile.kernels.format.shape import SiteShape
from kvmix_compile.kernels.format.state import StateLayout
from kvmix_compile.progress import progress_bar
from tests.helpers.repository import ROOT
from tests.kernels.append_pair import Pair
from tests.kernels.attend_cases import Case
from tests.kernels.covering import Combination, covering, named
from tests.kernels.every_pair import APPENDING, ATTENDING, Choices, fits
from tests.kernels.gpu.trials import (
    LAUNCHES,
    PLACES,
    SMALLEST_QUERY_TILE,
    check_attend,
    check_chosen_append,
    check_chosen_attend,
    random_chunk,
    triton_append,
)
from tests.ptx.driver import chip
from tests.ptx.mutations import mutants
from tests.ptx.syntax import PtxError

CHIPS = (80, 90)
# Heads as large as any, and a prompt of more than a tile.
LARGE: Choices = {"dimensions": (*ATTENDING["dimensions"], (96, 96), (256, 256))}
KERNELS: dict[str, tuple[Choices, Callable[[Combination], Any]]] = {
    "attend": (ATTENDING | LAUNCHES | PLACES | LARGE | {"tokens": (*ATTENDING["tokens"], 70)}, check_chosen_attend),
    "append": (APPENDING | PLACES | LARGE, check_chosen_append),
}
# A large tile of queries of wider heads would not fit into shared memory, and is not launched (Launch.choose).
WIDEST_OF_LARGE_TILES = 128
NOT_NOTICED = "not noticed"
RESULTS = ROOT / "benchmarks" / "results"


def sample() -> Iterator[tuple[str, Combination]]:
    """A few cases in which each choice and each chip occurs."""
    for kernel, (choices, _) in KERNELS.items():
        for chosen in covering(choices | {"chip": CHIPS}, launched, together=1):
            yield kernel, chosen


def launched(chosen: Combination) -> bool:
    """Whether the choices go together, in a launch that may be."""
    large = chosen.get("query_tile", 0) > SMALLEST_QUERY_TILE
    return fits(chosen) and not (large and max(chosen["dimensions"]) > WIDEST_OF_LARGE_TILES)


def carry_out(kernel: str, chosen: Combination, number: int) -> float | None:
    """The largest difference from the reference, None where bytes are the same. Raises AssertionError, or PtxError for
    what a kernel must not do.
    """
    torch.manual_seed(0)
    with chip(number):
        return KERNELS[kernel][1](chosen)


def attend_a_little() -> None:
    """Keys with important channels and 2-bit values, over more blocks than the loop holds at once."""
    key, value = Precision(2, 32, 4, (4, 4, 3)), Precision(2, 32, 4)
    layout = StateLayout(SiteShape(1, 64, 64), key=key, value=value, sinks=4, recent=32)
    torch.manual_seed(0)
    check_attend(Case.random(layout, 4, [325], [0], 30, torch.float16), splits=2, blocks=2, query_tile=64)


def attend_codes_a_little() -> None:
    """As attend_a_little, of codes that are multiplied as they are."""
    key, value = Precision(2, 32, 4, (4, 4, 3)), Precision(3, 32, 4)
    layout = StateLayout(SiteShape(1, 64, 64), key=key, value=value, sinks=4, recent=32)
    torch.manual_seed(0)
    check_attend(Case.random(layout, 4, [325], [0], 3, torch.bfloat16), splits=2, blocks=1, from_codes=True)


def append_a_little() -> None:
    """Blocks of the chunk, and twice as many from the ring: the second chunk takes the places of all of it."""
    precision = Precision(2, 32, 4)
    layout = StateLayout(SiteShape(1, 64, 64), key=precision, value=precision, sinks=4, recent=64)
    pair = Pair(triton_append.append, layout, 2, torch.float16)
    torch.manual_seed(0)
    for tokens, start in ((110, 3), (96, 0)):
        pair.append(*random_chunk(layout, 2, tokens, torch.float16, 1.0), torch.tensor([start, 0]))
    pair.check()


A_LITTLE = {"attend_elements": attend_a_little, "attend_codes": attend_codes_a_little, "append": append_a_little}


def fate_of_mutants(kernel: str, number: int, kinds: tuple[str, ...] = ()) -> Iterator[tuple[str, int, str]]:
    """What was taken out, of which line, and what came of it: of `kinds`, or of all of them."""
    run = A_LITTLE[kernel]
    with chip(number) as launched:
        run()
        compiler = next(each for each in launched if each.kernel.name == f"{kernel}_kernel")
        for what, line, mutant in mutants(compiler.ptx):
            if not kinds or what in kinds:
                with compiler.instead(mutant):
                    yield what, line, _fate(run)


def _fate(run: Callable[[], None]) -> str:
    try:
        run()
    except PtxError as error:
        return str(error).partition("\n")[0]
    except AssertionError:
        return "other numbers"
    return NOT_NOTICED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chips", nargs="+", type=int, default=CHIPS)
    for number in parser.parse_args().chips:
        rows = [row for kernel in KERNELS for row in _each(kernel, number)]
        taken_out = [_mutations(kernel, number) for kernel in A_LITTLE]
        record = {"chip": number, "triton": triton.__version__, "cases": rows, "taken_out": taken_out}
        record |= circumstances("tests.kernels.gpu.compiled", torch.device("cpu"))
        write_json(RESULTS / f"ptx-sm{number}.json", record)
        failed = [row for row in rows if row["failure"]]
        print(f"sm_{number}: {len(rows)} cases, {len(failed)} failed")
        print(json.dumps(failed, indent=1), json.dumps(taken_out, indent=1))


def _each(kernel: str, number: int) -> Iterator[dict[str, Any]]:
    cases = covering(KERNELS[kernel][0], launched)
    with progress_bar(f"{kernel} on sm_{number}", len(cases), shown=True) as advance:
        for chosen in cases:
            start, difference, failure = perf_counter(), None, None
            try:
                difference = carry_out(kernel, chosen, number)
            except (AssertionError, PtxError) as error:
                failure = str(error)
            row = {"kernel": kernel, "case": named(chosen), "difference": difference}
            yield row | {"failure": failure, "seconds": round(perf_counter() - start, 2)}
            advance()


def _mutations(kernel: str, number: int) -> dict[str, Any]:
    found, left = Counter[tuple[str, bool]](), list[str]()
    for what, line, fate in fate_of_mutants(kernel, number):
        noticed = fate != NOT_NOTICED
        found[what, noticed] += 1
        if not noticed:
            left.append(f"{what}, line {line}")
    counts = {what: [found[what, True], found[what, True] + found[what, False]] for what, _ in sorted(found)}
    return {"kernel": kernel, "noticed_of": counts, "not_noticed": left}


if __name__ == "__main__":
    main()
