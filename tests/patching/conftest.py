"""Models to patch, and snapshots of them."""

import pytest

from tests.support.subject import Snapshot, build_subject


@pytest.fixture(params=["led", "gpt_neox"])
def subject(request):
    return build_subject(request.param)


@pytest.fixture
def led():
    return build_subject("led")


@pytest.fixture
def neox():
    return build_subject("gpt_neox")


@pytest.fixture
def snapshot():
    """Remember a model: ``before = snapshot(subject)``, and later ``before.assert_unchanged()``."""
    return Snapshot
