"""Results name the code that produced them."""

from __future__ import annotations

import shutil

from attnzoo.benchmarks.measure import machine
from attnzoo.benchmarks.source import digest, installed


def test_machine_contains_the_digest_of_the_code():
    assert machine("cpu")["source"] == installed() and len(installed()) == 12


def test_digest_depends_on_code_and_names_but_not_on_places(tmp_path):
    package, beside, inside = tmp_path / "package", tmp_path / "adapters", tmp_path / "package" / "adapters"
    package.mkdir()
    beside.mkdir()
    (package / "core.py").write_text("one\n")
    (beside / "family.py").write_text("two\n")
    expected = digest({"": package, "adapters": beside})
    shutil.copytree(beside, inside)
    assert digest({"": package, "adapters": inside}) == expected
    (inside / "notes.txt").write_text("not code")
    assert digest({"": package, "adapters": inside}) == expected
    (inside / "family.py").write_text("three\n")
    changed = digest({"": package, "adapters": inside})
    (inside / "family.py").rename(inside / "other.py")
    renamed = digest({"": package, "adapters": inside})
    assert len({expected, changed, renamed}) == 3
