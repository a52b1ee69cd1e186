"""Run the items of an agenda within a number of seconds, each in a process, and keep every result on disk at once.

The folder of a session has four files: ``index.json`` (what ran, and how it ended), ``results.tar.gz`` (one JSON file
for each item), ``report.md`` (tables and red lines) and ``log.txt`` (what the processes printed). Each file is complete
after every item, so an interrupted session loses only the item that was running.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import attnzoo
from attnzoo.benchmarks.gpu.agenda import Item
from attnzoo.benchmarks.gpu.item import arguments
from attnzoo.benchmarks.gpu.report import report
from attnzoo.benchmarks.gpu.results import OVERRAN, Results, read, together
from attnzoo.benchmarks.gpu.settings import Settings
from attnzoo.errors import InvalidArgumentError

INDEX, ARCHIVE, REPORT, LOG = "index.json", "results.tar.gz", "report.md", "log.txt"
DONE, FAILED, KILLED, LEFT_OUT = "done", "failed", "killed", "left out"
# Seconds that the session keeps for its files.
_RESERVE = 2.0

Clock = Callable[[], float]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Ended:
    """How an item ended.

    Attributes:
        name: name of the item.
        status: ``"done"``, ``"failed"`` (the process raised or died), ``"overran"`` (killed at the limit of the item,
            as a kernel that hangs), ``"killed"`` (at the end of the session), or ``"left out"`` (not enough time).
        seconds: how long the process ran.
        estimate, limit: as in :class:`~attnzoo.benchmarks.gpu.agenda.Item`; ``limit`` is not above what was left.
        reason: the last line that a failed process printed, or why the item was left out.
    """

    name: str
    status: str
    seconds: float
    estimate: float
    limit: float
    reason: str = ""


@dataclass
class Session:
    """A run of the agenda.

    Attributes:
        folder: folder of the four files. It must not contain an earlier session.
        settings: the settings of all items.
        seconds: the time for the whole session.
        machine: versions of the software and names of the hardware.
        say: function that gets each line for the terminal.
        clock: function that returns the time in seconds.
    """

    folder: Path
    settings: Settings
    seconds: float
    machine: dict[str, str]
    say: Say = print
    clock: Clock = time.monotonic
    ended: list[Ended] = field(default_factory=list)

    def __post_init__(self) -> None:
        if (self.folder / INDEX).exists():
            raise InvalidArgumentError(
                "out",
                f"{self.folder}, which has {INDEX}",
                f"a folder without {INDEX}, or --seconds 0 to print its report",
            )
        self.folder.mkdir(parents=True, exist_ok=True)

    def run(self, items: Sequence[Item]) -> None:
        """Run the items in order, as far as the time allows."""
        deadline = self.clock() + self.seconds - _RESERVE
        with tempfile.TemporaryDirectory(prefix="attnzoo-gpu-") as name, (self.folder / LOG).open("a") as log:
            work = Path(name)
            for item in items:
                left = deadline - self.clock()
                if left < item.estimate / 2:
                    reason = f"about {item.estimate:.0f} s needed, {max(left, 0):.0f} s left"
                    self.ended.append(Ended(item.name, LEFT_OUT, 0.0, item.estimate, item.limit, reason))
                    continue
                self.say(f"{item.name}: at most {min(item.limit, left):.0f} s, {left:.0f} s left in total")
                try:
                    self.ended.append(self._run_item(item, min(item.limit, left), work, log))
                finally:
                    self._keep(work)
            self._keep(work)

    def _run_item(self, item: Item, limit: float, work: Path, log: IO[str]) -> Ended:
        log.write(f"\n== {item.name}\n")
        log.flush()
        position, start = log.tell(), self.clock()
        command = arguments(item.name, work / f"{item.name}.json", self.settings)
        # The process must import this attnzoo, and no measurement of an earlier run may decide what auto selects.
        root = str(Path(attnzoo.__path__[0]).parent)
        variables = dict(OMP_NUM_THREADS="1", ATTNZOO_CACHE_DIR=str(work / "cache"), KINETO_LOG_LEVEL="6")
        status, reason = DONE, ""
        with subprocess.Popen(
            command, cwd=root, env={**os.environ, **variables}, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process:  # fmt: skip
            try:
                if process.wait(limit):
                    status, reason = FAILED, _last_line(self.folder / LOG, position, process.returncode)
            except subprocess.TimeoutExpired:
                overran = limit >= item.limit
                status, where = (OVERRAN, "its limit") if overran else (KILLED, "the end of the session")
                reason = f"killed at {where}, after {limit:.0f} s"
            finally:
                _kill(process)
        return Ended(item.name, status, self.clock() - start, item.estimate, limit, reason)

    def _keep(self, work: Path) -> None:
        """Write index, archive and report with the results so far."""
        files = sorted(work.glob("*.json"), key=lambda path: path.stat().st_mtime)
        _replace(self.folder / ARCHIVE, lambda path: _pack(files, path))
        ended = [asdict(item) for item in self.ended]
        index = {**asdict(self.settings), "seconds": self.seconds, "machine": self.machine, "items": ended}
        _replace(self.folder / INDEX, lambda path: path.write_text(json.dumps(index, indent=1) + "\n"))
        text = report(index, together([read(file.read_text()) for file in files]))
        _replace(self.folder / REPORT, lambda path: path.write_text(text))


def load(option: str, folder: Path) -> tuple[dict[str, Any], Results]:
    """Return the index and all results of a session.

    Raises:
        InvalidArgumentError: ``folder`` contains no session. ``option`` is the name in the message.
    """
    for name in (INDEX, ARCHIVE):
        if not (folder / name).exists():
            raise InvalidArgumentError(option, f"{folder}, which has no {name}", "the folder of a session")
    parts = []
    with tarfile.open(folder / ARCHIVE) as archive:
        for member in archive.getmembers():
            content = archive.extractfile(member)
            if content is not None:
                parts.append(read(content.read().decode()))
    return json.loads((folder / INDEX).read_text()), together(parts)


def _kill(process: subprocess.Popen[Any]) -> None:
    """Kill the process and all processes that it started, because they would occupy the device."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _last_line(log: Path, position: int, code: int) -> str:
    """Return the exit code and the last line that was written to the log after ``position``."""
    with log.open() as file:
        file.seek(position)
        lines = [line.strip() for line in file if line.strip()]
    return f"exit code {code}" + (f": {lines[-1]}" if lines else "")


def _pack(files: Sequence[Path], path: Path) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for file in files:
            archive.add(file, file.name)


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    """Make a file under another name first, so that the file is complete at any time."""
    new = path.with_name(path.name + ".new")
    make(new)
    new.replace(path)
