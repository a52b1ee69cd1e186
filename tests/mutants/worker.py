"""Run the tests of a mutant, in a copy of the working tree and in a separate process."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.mutants.mutations import ROOT, Mutant

# CPU seconds for a single test: a mutant may never end. The longest test takes a third of this.
_TEST_SECONDS = 90
# Seconds of the clock for a single test, for mutants that wait for ever and use no CPU.
_WAIT_SECONDS = 1200
_FOLDERS = ("attnzoo", "adapters", "benchmarks", "tests", "docs")


class Worker:
    """A copy of the working tree in which one mutant at a time is tested.

    The processes start from a server that has already imported the large packages (torch, transformers).
    """

    _context = multiprocessing.get_context("forkserver")
    _context.set_forkserver_preload(["torch", "transformers", "pytest", "hypothesis"])

    def __init__(self, folder: Path) -> None:
        self.tree = folder
        for name in _FOLDERS:
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        for pattern in ("*.toml", "*.md", "*.py", "*.txt"):
            for path in ROOT.glob(pattern):
                shutil.copy(path, folder)
        for name in ("adapters", "benchmarks"):  # where an installation has them
            (folder / "attnzoo" / name).symlink_to(Path("..") / name)

    def test(self, mutant: Mutant, tests: list[str], seconds: float) -> tuple[str, list[str]]:
        """Run tests on a mutant, until the first failure or for ``seconds`` of CPU time.

        Args:
            mutant: the fault to plant.
            tests: test files, or test functions as ``file::function``, in the order to run them.
            seconds: limit in seconds of CPU time, because the machine may have other work.

        Returns:
            ``caught by ...`` or ``survived ...``, and the tests that did not end in time.
        """
        target = self.tree / mutant.path
        original = target.read_text()
        try:
            target.write_text(mutant.code)
            return self.run(tests, seconds)
        finally:
            target.write_text(original)

    def run(
        self,
        tests: list[str],
        seconds: float,
        test_seconds: float = _TEST_SECONDS,
        plugins: Sequence[object] = (),
        options: Sequence[str] = (),
    ) -> tuple[str, list[str]]:
        """Do the same as :meth:`test`, without a mutant. If the package cannot be imported, pytest's exit code is 4.

        ``test_seconds`` is the limit for a single test. ``plugins`` and ``options`` are for pytest.
        """
        log, begun = self.tree / "log", self.tree / "begun"
        log.write_text("")
        begun.write_text("")
        plugins = [_Limits(test_seconds), *plugins]
        process = self._context.Process(target=_run_tests, args=(self.tree, tests, seconds, plugins, options))
        process.start()
        process.join()
        output = log.read_text(errors="replace")
        if process.exitcode == 0:
            return "survived all tests", []
        if process.exitcode == -signal.SIGXCPU:
            return f"survived {seconds:.0f} s of tests", unfinished(tests, begun.read_text())
        if process.exitcode == -signal.SIGPROF or "Timeout (0:" in output:
            return "caught by a test that did not end", []
        failures = (line.split(" ")[1] for line in output.splitlines() if line.startswith(("FAILED ", "ERROR ")))
        return f"caught by {next(failures, f'exit code {process.exitcode} of pytest').removeprefix('tests/')}", []


def unfinished(tests: list[str], begun: str) -> list[str]:
    """Return the tests that did not end, from the lines ``file::function[parameters]`` of all tests that began."""
    place = 0
    for name in begun.splitlines():
        place = next((n for n in range(place, len(tests)) if _belongs(name, tests[n])), place)
    return tests[place:]


def _belongs(name: str, test: str) -> bool:
    return name == test or name.startswith((f"{test}[", f"{test}::"))


class _Limits:
    """A pytest plugin: notes each test that begins, and ends the process if a single test takes too long."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def pytest_configure(self, config: object) -> None:
        self._begun = Path.cwd() / "begun"

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        with self._begun.open("a") as lines:
            lines.write(f"{nodeid}\n")
        signal.setitimer(signal.ITIMER_PROF, self._seconds)  # SIGPROF ends the process


def _run_tests(tree: Path, tests: list[str], seconds: float, plugins: Sequence[object], options: Sequence[str]) -> None:
    output = os.open(tree / "log", os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(tree)
    sys.path[:] = [str(tree), *(entry for entry in sys.path if entry not in ("", str(ROOT)))]
    # These modules are from the original tree: this one, and those that another user of the same server has loaded.
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "attnzoo")]:
        del sys.modules[name]
    sys.dont_write_bytecode = True
    os.environ.update(PYTHONPATH=str(tree), PYTHONDONTWRITEBYTECODE="1", ATTNZOO_HYPOTHESIS_PROFILE="mutants")
    limit = max(1, round(seconds))
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 10))  # SIGXCPU ends the process
    import pytest

    fixed = ["-x", "--no-header", "--tb=line", "-p", "no:cacheprovider", "--basetemp", str(tree / "tmp")]
    fixed += ["-o", f"faulthandler_timeout={_WAIT_SECONDS}", "-o", "faulthandler_exit_on_timeout=true"]
    os._exit(int(pytest.main([*fixed, *options, *tests], plugins=plugins)))
