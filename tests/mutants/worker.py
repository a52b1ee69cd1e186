"""Run the tests of a mutant, in a copy of the working tree and in a separate process."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
from pathlib import Path

from tests.mutants.mutations import ROOT, Mutant

# pytest exits with a failure if one test takes longer than this (in seconds), because a mutant may never end.
_HANG = 45
_FOLDERS = ("attnzoo", "adapters", "benchmarks", "tests", "docs")


class Worker:
    """A copy of the working tree in which one mutant at a time is tested.

    The processes start from a server that has already imported the large packages (torch, transformers).
    """

    _context = multiprocessing.get_context("forkserver")
    _context.set_forkserver_preload(["torch", "transformers", "pytest", "hypothesis"])

    def __init__(self, folder: Path) -> None:
        self._tree = folder
        for name in _FOLDERS:
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        for pattern in ("*.toml", "*.md", "*.py", "*.txt"):
            for path in ROOT.glob(pattern):
                shutil.copy(path, folder)
        for name in ("adapters", "benchmarks"):  # where an installation has them
            (folder / "attnzoo" / name).symlink_to(Path("..") / name)

    def test(self, mutant: Mutant, tests: list[str], seconds: float) -> tuple[str, list[str]]:
        """Run test files on a mutant, until the first failure or for ``seconds``.

        Returns:
            ``caught by ...`` or ``survived ...``, and the test files that did not end in time.
        """
        target = self._tree / mutant.path
        original = target.read_text()
        try:
            target.write_text(mutant.code)
            return self.run(tests, seconds)
        finally:
            target.write_text(original)

    def run(self, tests: list[str], seconds: float) -> tuple[str, list[str]]:
        """Do the same as :meth:`test`, without a mutant. If the package cannot be imported, pytest's exit code is 4."""
        log = self._tree / "log"
        log.write_text("")
        process = self._context.Process(target=_run_tests, args=(self._tree, tests, log))
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
            return f"survived {seconds:.0f} s of tests", unfinished(tests, log.read_text(errors="replace"))
        if process.exitcode == 0:
            return "survived all tests", []
        output = log.read_text(errors="replace")
        if "Timeout (0:" in output:
            return "caught by a test that did not end", []
        failures = (line.split(" ")[1] for line in output.splitlines() if line.startswith(("FAILED ", "ERROR ")))
        return f"caught by {next(failures, f'exit code {process.exitcode} of pytest').removeprefix('tests/')}", []


def unfinished(tests: list[str], output: str) -> list[str]:
    """Return the test files that did not end. pytest starts a line with the name of a file when the file begins."""
    begun = [number for number, test in enumerate(tests) if f"\n{test} " in output]
    return tests[max(begun, default=0) :]


def _run_tests(tree: Path, tests: list[str], log: Path) -> None:
    output = os.open(log, os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(tree)
    sys.path[:] = [str(tree), *(entry for entry in sys.path if entry not in ("", str(ROOT)))]
    # These modules are from the original tree: this one, and those that another user of the same server has loaded.
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "attnzoo")]:
        del sys.modules[name]
    sys.dont_write_bytecode = True
    os.environ.update(PYTHONPATH=str(tree), PYTHONDONTWRITEBYTECODE="1", ATTNZOO_HYPOTHESIS_PROFILE="mutants")
    import pytest

    options = ["-x", "--no-header", "--tb=line", "-p", "no:cacheprovider", "--basetemp", str(tree / "tmp")]
    options += ["-o", f"faulthandler_timeout={_HANG}", "-o", "faulthandler_exit_on_timeout=true"]
    os._exit(int(pytest.main([*options, *tests])))
