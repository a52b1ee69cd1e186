"""Results say which code they are of."""

from __future__ import annotations

import shutil

from attnzoo.benchmarks.measure import machine
from attnzoo.benchmarks.source import digest, installed


def test_results_name_the_code_they_are_of():
    assert machine("cpu")["source"] == installed() and len(installed()) == 12


def test_it_is_the_same_wherever_the_folders_lie_and_another_for_other_code(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "core.py").write_text("one\n")
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "family.py").write_text("two\n")
    apart = digest({"": tmp_path / "package", "adapters": tmp_path / "adapters"})
    shutil.copytree(tmp_path / "adapters", tmp_path / "package" / "adapters")
    inside = tmp_path / "package" / "adapters"
    assert digest({"": tmp_path / "package", "adapters": inside}) == apart
    (inside / "notes.txt").write_text("not code")
    assert digest({"": tmp_path / "package", "adapters": inside}) == apart
    (inside / "family.py").write_text("three\n")
    changed = digest({"": tmp_path / "package", "adapters": inside})
    (inside / "family.py").rename(inside / "other.py")
    assert len({apart, changed, digest({"": tmp_path / "package", "adapters": inside})}) == 3
