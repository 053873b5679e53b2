"""`kvmix plan`: measure what matters in a model, and spend a budget of bits on it."""

from pathlib import Path
from time import perf_counter

from kvmix_command.launched import is_first
from kvmix_compile.cli.engines import Asked, plan_for_engine
from kvmix_compile.cli.loading import load_model
from kvmix_compile.cli.measuring import analyze_on
from kvmix_compile.cli.output import STANDARD_OUTPUT, console_beside
from kvmix_compile.cli.picture import plan_picture
from kvmix_compile.config import Config


def make_plan(
    name: str,
    budget: float | None,
    storage_budget: float | None,
    policy: str,
    context: int | None,
    calibration: Path | None,
    output: Path | None,
    engine: str | None,
    formats: list[str] | None,
    most_loss: float | None,
    calibrated: bool,
    exported: Path | None,
) -> None:
    """Make a plan, show it, and save it where asked for."""
    if engine is not None:
        asked = Asked(engine, tuple(formats or ()), budget, storage_budget, most_loss, context, calibrated)
        plan_for_engine(name, asked, calibration, exported, output)
        return
    start = perf_counter()
    config = Config(budget=budget, storage_budget=storage_budget, policy=policy, context=context).checked()  # type: ignore[arg-type]
    importance = analyze_on(load_model(name), calibration)
    plan = config.allocate(importance)
    console = console_beside(output)
    console.print(plan_picture(plan))
    console.print(f"measured on {importance.tokens} tokens in {perf_counter() - start:.1f} s")
    if output == STANDARD_OUTPUT:
        print(plan.as_json(), end="")
    elif output is not None and is_first():
        plan.save(output)
        console.print(f"saved to {output}")
