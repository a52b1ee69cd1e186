"""The command ``python -m attnzoo.benchmarks.gpu.prediction``. It needs no GPU, and it measures nothing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from attnzoo.benchmarks.gpu.prediction.goals import GOALS, NATIVE, SEQ_LEN
from attnzoo.benchmarks.gpu.prediction.page import lines
from attnzoo.benchmarks.gpu.prediction.stored import write
from attnzoo.errors import AttnzooError, InvalidArgumentError


def main(argv: Sequence[str] | None = None) -> None:
    """Count the work of all modules, write the counts to a file if wanted, and print the predictions."""
    parser = argparse.ArgumentParser(prog="python -m attnzoo.benchmarks.gpu.prediction", description=__doc__)
    parser.add_argument("--json", type=Path, help="file for the counts, from which make docs-results makes its tables")
    options = parser.parse_args(argv)
    if find_spec("triton") is None:
        raise InvalidArgumentError("triton", "no installed package", "pip install triton; a GPU is not needed")
    from attnzoo.benchmarks.gpu.prediction.count import count

    counts = [
        count(goal.family, SEQ_LEN, backend, train)
        for goal in GOALS
        for train in (False, True)
        for backend in (NATIVE, goal.backend)
    ]
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "triton")}
    if options.json is not None:
        write(counts, versions, options.json)
    print("\n".join(lines(counts, versions)))


if __name__ == "__main__":
    try:
        main()
    except AttnzooError as error:
        sys.exit(f"error: {error}")
