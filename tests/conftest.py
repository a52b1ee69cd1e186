"""What every test shares: hypothesis profiles, one thread, and skipping what needs a GPU where there is none."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from attnzoo.registry import registry

torch.set_num_threads(1)
_common = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.register_profile("default", max_examples=60, **_common)
settings.register_profile("long", max_examples=2500, **_common)
settings.load_profile(os.environ.get("ATTNZOO_HYPOTHESIS_PROFILE", "default"))


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason=f"needs a CUDA device; torch {torch.__version__} sees none")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(params=DEVICES)
def device(request):
    """Every device there is: CPU always, CUDA wherever there is one."""
    return request.param


@pytest.fixture(autouse=True, scope="session")
def no_measurements(tmp_path_factory):
    """What the developer once measured does not decide what `auto` takes in tests."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ATTNZOO_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patched.delenv("ATTNZOO_AUTO", raising=False)
        yield


@pytest.fixture
def isolated_registry():
    """Each test gets a registry it may change, and entry points it may break."""
    with registry.replaced_by(registry.copy()):
        yield


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
