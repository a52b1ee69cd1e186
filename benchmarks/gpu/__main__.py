"""The command ``python -m attnzoo.benchmarks.gpu``."""

from __future__ import annotations

import argparse
import datetime
import signal
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NoReturn

import torch

from attnzoo.benchmarks.gpu.against import comparison
from attnzoo.benchmarks.gpu.agenda import agenda
from attnzoo.benchmarks.gpu.report import red_lines
from attnzoo.benchmarks.gpu.session import REPORT, Session, load
from attnzoo.benchmarks.gpu.settings import Settings
from attnzoo.benchmarks.measure import machine
from attnzoo.errors import AttnzooError, InvalidArgumentError, UnknownNameError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a session, print its report, and return the exit code: 1 if there are red lines."""
    options = _parser().parse_args(argv)
    if options.seconds:
        _run(options)
    index, results = load("out", options.out)
    print((options.out / REPORT).read_text())
    if options.against is not None:
        print(comparison(load("against", options.against), (index, results)))
    red = red_lines(index, results)
    for line in red:
        print(f"\033[31mRED {line}\033[0m" if sys.stdout.isatty() else f"RED {line}")
    return 1 if red else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m attnzoo.benchmarks.gpu", description=__doc__)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--seconds", type=float, default=300.0, help="time for everything; 0 only reads --out")
    parser.add_argument("--out", type=Path, default=Path("gpu") / stamp, help="folder for the four files of the run")
    parser.add_argument("--against", type=Path, help="folder of an earlier run, to compare with")
    parser.add_argument("--only", default="*", help="glob for the names of the items to run")
    parser.add_argument("--device", default="cuda", help="cuda; or cpu, to test this command with --tiny")
    parser.add_argument("--tiny", action="store_true", help="tiny models and inputs, whose times mean nothing")
    return parser


def _run(options: argparse.Namespace) -> None:
    settings = Settings(options.device, options.tiny)
    if options.seconds < 0:
        raise InvalidArgumentError("seconds", options.seconds, "a number >= 0")
    if settings.device not in ("cuda", "cpu"):
        raise UnknownNameError("device", settings.device, ("cuda", "cpu"))
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise InvalidArgumentError("device", f"'cuda', but torch {torch.__version__} sees none", "'cpu' with --tiny")
    if settings.device == "cpu" and not settings.tiny:
        raise InvalidArgumentError("device", "'cpu' without --tiny", "'cuda', or 'cpu' with --tiny")
    if options.against is not None:
        load("against", options.against)  # raises now, not after an hour
    items = [item for item in agenda(settings) if fnmatchcase(item.name, options.only)]
    if not items:
        raise UnknownNameError("only", options.only, [item.name for item in agenda(settings)])
    signal.signal(signal.SIGTERM, _interrupt)
    session = Session(options.out.resolve(), settings, options.seconds, machine(settings.device))
    try:
        session.run(items)
    except KeyboardInterrupt:
        print("interrupted; the results until now are kept", file=sys.stderr)


def _interrupt(number: int, frame: object) -> NoReturn:
    """End like after Ctrl+C: kill the running item, and write what there is."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    try:
        sys.exit(main())
    except AttnzooError as error:
        sys.exit(f"error: {error}")
