"""Configuration of all tests: hypothesis profiles, one thread, and skipped CUDA tests on machines without a GPU."""

import gc
import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

import attnzoo
from attnzoo.registry import registry
from tests.support.fake_backends import fake_backend

torch.set_num_threads(1)
# A fixture that installs a fake package is set up once for all examples of a test.
_checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
_common = dict(deadline=None, suppress_health_check=_checks)
settings.register_profile("default", max_examples=60, **_common)
# Several properties add up to more than 25,000 examples for each exact backend.
settings.register_profile("long", max_examples=5_000, **_common)
# Kernels are compiled for each form of an attention: about ten seconds on a GPU, so there are fewer examples.
settings.register_profile("cuda", max_examples=15, **_common)
# A mutant must only fail: few examples, no time for shrinking, and no examples from runs of other mutants.
settings.register_profile("mutants", max_examples=20, database=None, phases=[Phase.explicit, Phase.generate], **_common)
settings.load_profile(os.environ.get("ATTNZOO_HYPOTHESIS_PROFILE", "default"))

if not torch.cuda.is_available():
    # torch.manual_seed formats the stack to seed absent devices later, which takes 3% of the time of all tests.
    torch.cuda.manual_seed_all = torch.xpu.manual_seed_all = lambda seed: None


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Collect no garbage while the tests are imported, because nearly all new objects are modules that stay."""
    gc.disable()
    result = yield
    gc.enable()
    return result


@pytest.fixture(autouse=True, scope="module")
def frozen():
    """Exclude from garbage collection what exists before a module. Visiting torch takes a sixth of the time."""
    gc.collect()
    gc.freeze()


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
    """The CPU, and CUDA if there is a device."""
    return request.param


@pytest.fixture(autouse=True, scope="session")
def empty_cache(tmp_path_factory):
    """Use an empty cache: the developer's measurements must not decide what `auto` selects in tests."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ATTNZOO_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patched.delenv("ATTNZOO_AUTO", raising=False)
        yield


@pytest.fixture
def isolated_registry():
    """Let the test change the registry, and restore the content of the registry afterwards."""
    with registry.replaced_by(registry.copy()):
        yield


@pytest.fixture
def add_backend(isolated_registry):
    """Register a backend for the test that computes as eager does: ``add_backend("forward-only", grad=False)``."""
    return lambda *names, **changes: attnzoo.register_backend(fake_backend(*names, **changes))


@pytest.fixture
def fresh_accelerate():
    """Forget the settings of the first ``Accelerator`` of the process, which accelerate keeps for all later ones."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
