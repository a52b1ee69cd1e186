"""Run the tests of a mutant, in a copy of the working tree and in a separate process."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.mutants.mutations import ROOT, Mutant

# CPU seconds for a single test: a mutant may never end. The longest test takes a third of this.
_TEST_SECONDS = 90
# Seconds of the clock for a single test, for mutants that wait for ever and use no CPU.
_WAIT_SECONDS = 1200
_NO_TESTS = 5  # the exit code of pytest if all tests are deselected
_FAMILIES = (
    "led",
    "longformer",
    "longt5",
    "big_bird",
    "bigbird_pegasus",
    "pegasus_x",
    "reformer",
    "gpt_neox",
    "gpt_bigcode",
)
_MODELS = [f"transformers.models.{family}.modeling_{family}" for family in _FAMILIES]
_FOLDERS = ("attnzoo", "adapters", "benchmarks", "tests", "docs")


class Outcome(NamedTuple):
    """The result of a run of pytest.

    Attributes:
        text: ``caught by ...`` or ``survived ...``.
        seconds: CPU time, or the limit if the tests did not end in time.
        test: the test function that failed, as ``file::function``. Empty if no single test failed.
    """

    text: str
    seconds: float
    test: str = ""


class Worker:
    """A copy of the working tree in which one mutant at a time is tested.

    The processes start from a server that has already imported large modules of other packages.
    """

    _context = multiprocessing.get_context("forkserver")
    _context.set_forkserver_preload(["pytest", "hypothesis", "torch._dynamo", *_MODELS])

    def __init__(self, folder: Path) -> None:
        self.tree = folder
        for name in _FOLDERS:
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        for pattern in ("*.toml", "*.md", "*.py", "*.txt"):
            for path in ROOT.glob(pattern):
                shutil.copy(path, folder)
        for name in ("adapters", "benchmarks"):  # where an installation has them
            (folder / "attnzoo" / name).symlink_to(Path("..") / name)

    def test(self, mutant: Mutant, tests: list[str], seconds: float, options: Sequence[str] = ()) -> Outcome:
        """Run tests on a mutant, until the first failure or for ``seconds`` of CPU time.

        Args:
            mutant: the fault to plant.
            tests: test files, or test functions as ``file::function``, in the order to run them.
            seconds: limit in seconds of CPU time, because the machine may have other work.
            options: options for pytest.

        Returns:
            whether a test failed, and the CPU seconds of the run.
        """
        target = self.tree / mutant.path
        original = target.read_text()
        try:
            target.write_text(mutant.code)
            return self.run(tests, seconds, options=options)
        finally:
            target.write_text(original)

    def run(
        self,
        tests: list[str],
        seconds: float,
        test_seconds: float = _TEST_SECONDS,
        plugins: Sequence[object] = (),
        options: Sequence[str] = (),
    ) -> Outcome:
        """Do the same as :meth:`test`, without a mutant. If the package cannot be imported, pytest's exit code is 4.

        ``test_seconds`` is the limit for a single test. ``plugins`` and ``options`` are for pytest.
        """
        log, used = self.tree / "log", self.tree / "seconds"
        log.write_text("")
        used.unlink(missing_ok=True)
        plugins = [_Limits(test_seconds), *plugins]
        process = self._context.Process(target=_run_tests, args=(self.tree, tests, seconds, plugins, options))
        process.start()
        process.join()
        took = float(used.read_text()) if used.exists() else seconds
        return _outcome(process.exitcode, log.read_text(errors="replace"), seconds, took)


def _outcome(exit_code: int | None, output: str, seconds: float, took: float) -> Outcome:
    if exit_code in (0, _NO_TESTS):
        return Outcome("survived all tests", took)
    if exit_code == -signal.SIGXCPU:
        return Outcome(f"survived {seconds:.0f} s of tests", took)
    if exit_code == -signal.SIGPROF or "Timeout (0:" in output:
        return Outcome("caught by a test that did not end", took)
    failures = [line.split(" ")[1] for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if not failures:
        return Outcome(f"caught by exit code {exit_code} of pytest", took)
    # Output of a nested run of pytest comes before the own summary.
    return Outcome(f"caught by {failures[-1].removeprefix('tests/')}", took, failures[-1].partition("[")[0])


class _Limits:
    """A pytest plugin that ends the process if a single test takes too long."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def pytest_runtest_logstart(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, self._seconds)  # SIGPROF ends the process


def _run_tests(tree: Path, tests: list[str], seconds: float, plugins: Sequence[object], options: Sequence[str]) -> None:
    output = os.open(tree / "log", os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(tree)
    sys.path[:] = [str(tree), *(entry for entry in sys.path if entry not in ("", str(ROOT)))]
    # These modules are from the original tree: this one and its imports.
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    if "attnzoo" in sys.modules:
        raise RuntimeError("attnzoo: the fork server has imported it; start the worker in a fresh process")
    sys.dont_write_bytecode = True
    os.environ.update(PYTHONPATH=str(tree), PYTHONDONTWRITEBYTECODE="1", ATTNZOO_HYPOTHESIS_PROFILE="mutants")
    limit = max(1, round(seconds))
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 10))  # SIGXCPU ends the process
    import pytest

    fixed = ["-x", "--no-header", "--tb=line", "-p", "no:cacheprovider", "--basetemp", str(tree / "tmp")]
    fixed += ["-o", f"faulthandler_timeout={_WAIT_SECONDS}", "-o", "faulthandler_exit_on_timeout=true"]
    code = int(pytest.main([*fixed, *options, *tests], plugins=plugins))
    (tree / "seconds").write_text(str(time.process_time()))
    os._exit(code)
