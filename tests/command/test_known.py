"""What the command line says of kvmix_compile without importing it is so."""

import inspect
from importlib import import_module

import pytest
import typer

from kvmix_command import known
from kvmix_command.main import app
from kvmix_compile import config
from kvmix_compile.cli import efforts, engines, fit, loading
from kvmix_compile.engines import measured
from kvmix_compile.evaluate import passkey, puzzles, records, tasks
from kvmix_compile.evaluate.baselines import BASELINES
from kvmix_compile.passes.allocate.policies import POLICIES
from kvmix_compile.passes.allocate.whole_layers import FORMATS


def test_names_are_those_that_there_are() -> None:
    assert known.MODELS == loading.NAMES
    assert tuple(POLICIES) == known.POLICIES
    assert tuple(fit.DTYPES) == known.DTYPES
    assert known.BASELINES == BASELINES
    assert known.ENGINES == engines.ENGINES
    assert tuple(FORMATS) == known.CACHE_FORMATS
    assert tuple(puzzles.PUZZLES) == known.TASKS
    assert known.PACKAGES == records.PACKAGES


def test_defaults_are_those_that_hold() -> None:
    assert known.DEFAULT_BUDGET == config.DEFAULT_BUDGET
    assert config.Config.policy == known.DEFAULT_POLICY
    assert known.MOST_LOSS == measured.MOST_LOSS
    assert efforts.USUAL.tokens == known.TOKENS
    assert passkey.LENGTHS[0] == known.PASSKEY_LENGTH
    assert tasks.LENGTHS[0] == known.TASK_LENGTH
    assert known.TASK_QUESTIONS == tasks.QUESTIONS


@pytest.mark.parametrize("command", app.registered_commands, ids=lambda command: command.callback.__name__)
def test_what_a_command_takes_is_what_its_function_takes(command: typer.models.CommandInfo) -> None:
    declared = command.callback
    assert declared is not None
    done = getattr(import_module(declared.done_by), declared.__name__)  # type: ignore[attr-defined]
    assert list(inspect.signature(done).parameters) == list(inspect.signature(declared).parameters)
