"""Shell completion of commands, options and values. It does not import torch, because a shell waits for it."""

import os
import subprocess
import sys

import pytest

COMPLETE = """
import atexit, sys
atexit.register(lambda: "torch" in sys.modules and print("torch was imported"))
from attnzoo.cli.app import main
main()
"""


def complete(words):
    environment = {"_ATTNZOO_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    command = [sys.executable, "-c", COMPLETE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("attnzoo ver", ["verify"]),
        ("attnzoo report --o", ["--out"]),
        ("attnzoo verify longt5", ["longt5_local", "longt5_tglobal"]),
        ("attnzoo bench --model ref", ["reformer", "reformer_local"]),
        ("attnzoo explain led --backend s", ["sdpa"]),
        ("attnzoo run --backend a", ["auto"]),
    ],
)
def test_completion_offers(words, values):
    assert complete(words) == values


def test_the_script_for_a_shell_calls_the_installed_command():
    command = [sys.executable, "-m", "attnzoo"]
    environment = {**os.environ, "_ATTNZOO_COMPLETE": "source_bash"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert "_ATTNZOO_COMPLETE=complete_bash" in done.stdout and "attnzoo" in done.stdout.split()[-1]


def test_families_are_the_workloads():
    from attnzoo.benchmarks.families import FAMILIES
    from attnzoo.benchmarks.models import WORKLOADS

    assert tuple(WORKLOADS) == FAMILIES


def test_rounds_of_tune_are_those_of_the_function():
    import inspect

    from attnzoo.cli.tune import tune
    from attnzoo.tuning.race import ROUNDS

    assert inspect.signature(tune).parameters["rounds"].default == ROUNDS
