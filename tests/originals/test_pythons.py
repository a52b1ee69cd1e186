"""Every Python of this machine computes the same fingerprints, for the functions of adapters and for hard sources."""

from __future__ import annotations

import pytest

from attnzoo.originals.fingerprint import fingerprint_of_source, object_at, source_from
from attnzoo.registry import registry
from tests.originals.pythons import VERSIONS, fingerprints_on, interpreters
from tests.originals.sources import HARD, every_source

PRELUDE = "def same(function): return function\ndef marked(*args, **options): return same\n\n# '\n"
AFTER = "\n    # still inside\n# after\nlast = '''\n'''\n"


@pytest.fixture(params=VERSIONS)
def version(request):
    """A Python version of this machine."""
    if request.param not in interpreters():
        pytest.skip(f"no Python {request.param} that starts; available: {', '.join(sorted(interpreters()))}")
    return request.param


def recorded():
    """Return ``{path: fingerprints}`` of every function that a registered adapter relies on."""
    adapters = [adapter for name in registry.model_types() if (adapter := registry.find_adapter(name)) is not None]
    return {path: known for adapter in adapters for point in adapter.points for path, known in point.verified.items()}


def test_functions_of_adapters_have_a_recorded_fingerprint(version):
    known = recorded()
    sources = {path: source_from(object_at(path)) for path in known}
    assert sources, "no adapter is registered"
    got = fingerprints_on(interpreters()[version], sources, {})["sources"]
    assert {path: value for path, value in got.items() if value not in known[path]} == {}


def test_hard_sources_have_the_same_fingerprint(version):
    sources = every_source()
    got = fingerprints_on(interpreters()[version], sources, {})["sources"]
    assert got == {name: fingerprint_of_source(text) for name, text in sources.items()}


def test_functions_in_files_have_the_same_fingerprint(version, tmp_path):
    expected, files = {}, {}
    for number, (name, (first, text)) in enumerate(HARD.items()):
        file = tmp_path / f"source_{number}.py"
        file.write_text(PRELUDE + text + AFTER, encoding="utf-8")
        files[name] = str(file)
        can_parse = tuple(map(int, version.split("."))) >= first
        expected[name] = fingerprint_of_source(text) if can_parse else None
    assert fingerprints_on(interpreters()[version], {}, files)["files"] == expected


def test_at_least_the_running_python_is_found():
    assert interpreters()
