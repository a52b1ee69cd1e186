"""A session runs items in order, each in a process, within its seconds, and keeps every result on disk."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import tarfile
import textwrap
import time
from pathlib import Path

import pytest

from attnzoo.benchmarks.gpu import session as module
from attnzoo.benchmarks.gpu.agenda import Item
from attnzoo.benchmarks.gpu.item import main
from attnzoo.benchmarks.gpu.results import Verdict
from attnzoo.benchmarks.gpu.session import Session, load
from attnzoo.benchmarks.gpu.settings import Settings
from attnzoo.errors import InvalidArgumentError, UnknownNameError
from tests.support.gpu_rows import MACHINE

KEEP = 'open(path, "w").write(json.dumps({"verdicts": [dict(what=name, status="ok", detail="")], "calls": []}))'
PROGRAMS = {
    "good": KEEP,
    "late": f"{KEEP}; time.sleep(60)",
    "bad": f'{KEEP}; print("the reason"); sys.exit(3)',
    "silent": "sys.exit(2)",
}


@pytest.fixture(autouse=True)
def programs(monkeypatch):
    def command(name, path, settings):
        start = f"import json, sys, time; name, path = {name!r}, {str(path)!r}; "
        return [sys.executable, "-S", "-c", start + PROGRAMS[name]]

    monkeypatch.setattr(module, "arguments", command)


def item(name, estimate=1.0, limit=30.0):
    return Item(name, lambda settings, keep: None, estimate, limit)


def run(folder, *items, seconds=100.0, **fields):
    session = Session(folder, Settings("cpu", tiny=True), seconds, MACHINE, say=lambda line: None, **fields)
    session.run(items)
    return {ended.name: ended for ended in session.ended}


def names(folder):
    return [verdict.what for verdict in load("out", folder)[1].verdicts]


def test_every_end_of_an_item_is_recorded(tmp_path):
    folder = tmp_path / "new" / "out"
    ended = run(
        folder, item("bad"), item("late", limit=1.0), item("silent"), item("good"), item("huge", estimate=300.0)
    )
    assert {name: end.status for name, end in ended.items()} == {
        "bad": "failed", "late": "overran", "silent": "failed", "good": "done", "huge": "left out",
    }  # fmt: skip
    assert ended["bad"].reason == "exit code 3: the reason" and ended["silent"].reason == "exit code 2"
    assert ended["late"].reason == "killed at its limit, after 1 s" and ended["late"].seconds >= 1.0
    assert ended["huge"].reason.startswith("about 300 s needed, ")
    assert names(folder) == ["bad", "late", "good"], "results of killed and failed items count"


def test_folder_has_four_files(tmp_path):
    run(tmp_path, item("good"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json", "log.txt", "report.md", "results.tar.gz"]
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["machine"] == MACHINE and index["tiny"] and [entry["name"] for entry in index["items"]] == ["good"]
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        assert archive.getnames() == ["good.json"]
    assert "# Imaginary 9000" in (tmp_path / "report.md").read_text()


def test_results_are_on_disk_before_the_next_item_starts(tmp_path, monkeypatch):
    seen = []

    def command(name, path, settings):
        if seen or name == "silent":
            seen.append(names(tmp_path))
        return [sys.executable, "-S", "-c", f"import json; name, path = {name!r}, {str(path)!r}; {KEEP}"]

    monkeypatch.setattr(module, "arguments", command)
    run(tmp_path, item("good"), item("silent"))
    assert seen == [["good"]]


def test_items_run_until_the_time_is_over(tmp_path):
    """Every look at this clock takes ten seconds. Two seconds are kept for the files."""
    ended = run(tmp_path, *(item(name, estimate=40.0, limit=40.0) for name in ("good", "bad", "late")),
                clock=itertools.count(0.0, 10.0).__next__, seconds=75.0)  # fmt: skip
    assert [end.status for end in ended.values()] == ["done", "failed", "left out"]
    assert [end.limit for end in ended.values()] == [40.0, 33.0, 40.0]


def test_processes_of_a_killed_item_are_killed_too(tmp_path, monkeypatch):
    started = tmp_path / "pid"
    program = f"""
        import subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
        open({str(started)!r}, "w").write(str(child.pid))
        time.sleep(60)
    """
    monkeypatch.setattr(module, "arguments", lambda *rest: [sys.executable, "-S", "-c", textwrap.dedent(program)])
    run(tmp_path / "out", item("late", limit=2.0))
    assert not _is_running(int(started.read_text()))


def _is_running(pid):
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        if state == "Z":
            return False
        time.sleep(0.1)
    return True


@pytest.fixture
def interruptible():
    """Handle SIGINT as a program in a terminal does. A background process of a shell ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupted_session_keeps_its_results(tmp_path, interruptible):
    def interrupt(line):
        if line.startswith("late"):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        Session(tmp_path, Settings("cpu", tiny=True), 100.0, MACHINE, say=interrupt).run([item("good"), item("late")])
    assert names(tmp_path) == ["good"]


def test_used_folder_and_missing_session_are_refused(tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"against: got .*which has no index\.json; allowed: the folder of"):
        load("against", tmp_path)
    run(tmp_path, item("good"))
    with pytest.raises(InvalidArgumentError, match=r"out: got .*, which has index\.json; allowed: a folder without"):
        run(tmp_path, item("good"))
    assert load("out", tmp_path)[1].verdicts == (Verdict("good", "ok", ""),)


def test_command_of_an_item_names_its_settings(tmp_path, monkeypatch):
    monkeypatch.undo()
    command = module.arguments("decode", tmp_path / "decode.json", Settings("cuda", tiny=True))
    assert command[2:] == ["attnzoo.benchmarks.gpu.item", "decode", str(tmp_path / "decode.json"), "cuda", "tiny"]
    with pytest.raises(UnknownNameError, match="item: got 'nothing'"):
        main(["nothing", *command[4:]])
