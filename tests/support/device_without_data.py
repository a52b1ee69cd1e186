"""Run attention modules on a device whose values nobody can read, and list where attnzoo would wait for a device."""

import copy
import inspect
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils._pytree import tree_map_only

import attnzoo
from attnzoo.benchmarks.cases import ModuleCall
from attnzoo.benchmarks.gpu import prediction
from attnzoo.benchmarks.gpu.prediction.count import run
from attnzoo.benchmarks.gpu.prediction.meta import Reads
from tests.support.models import FAMILIES

ROOT = Path(__file__).parents[2]
TRANSFORMS = ROOT / "attnzoo" / "spec" / "transforms.py"
READERS = (Path(torch.__file__).parent, Path(prediction.__file__).parent)


class WaitError(AssertionError):
    """The size of a tensor depends on values of the device, so this test cannot go on."""


class Waits(Reads):
    """Records each place of attnzoo where Python reads a value of the device."""

    def __init__(self):
        super().__init__()
        self.places = []

    def value_read(self):
        self.places.append(_place())

    def size_read(self, func, args, kwargs):
        raise WaitError(_place())


def _place():
    """Return the innermost function outside of PyTorch on the stack, with its file, or None if it is not attnzoo's.

    Functions that read for others do not count.
    """
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path in (Path(__file__), TRANSFORMS) or any(map(path.is_relative_to, READERS)):
            continue
        inside = any(path.is_relative_to(ROOT / folder) for folder in ("attnzoo", "adapters"))
        return f"{path.relative_to(ROOT)}: {frame.name}" if inside else None
    return None


@dataclass
class Ran:
    """What one call of a module did: where it waited, and what it launched.

    The projections of the module are among the launches. Kernels of Triton have names that end in ``_kernel``.
    """

    waits: set[str] = field(default_factory=set)
    forward: list[str] = field(default_factory=list)
    backward: list[str] = field(default_factory=list)


def modules_of(family, side, length=40):
    """Return the first module of each class of attention in a family, with the arguments of a call in the model."""
    model = FAMILIES[family].build()
    with attnzoo.patch(model, "eager") as handle:
        names = {site.name for site in handle.sites}
    calls, hooks = {}, []

    def keep(module, args, kwargs):
        calls.setdefault(type(module).__name__, (module, args, kwargs))

    for name, module in model.named_modules():
        if name in names:
            hooks.append(module.register_forward_pre_hook(keep, with_kwargs=True))
    has_cache = "use_cache" in inspect.signature(model.forward).parameters
    with torch.no_grad():
        model(**FAMILIES[family].inputs(length, side), **({"use_cache": False} if has_cache else {}))
    for hook in hooks:
        hook.remove()
    return calls


def run_module(module, args, kwargs, backend):
    """Run a module twice on the device without data, forward and backward, and return what the second call did."""
    module = copy.deepcopy(module).train(False)
    args, kwargs = tree_map_only(torch.Tensor, _leaf, (args, kwargs))
    recorded = run(ModuleCall(module, "*", module, args, kwargs, []), backend, True, Waits)
    names = ([work.name for work in works] for works in (recorded.forward, recorded.backward))
    return Ran({place for place in recorded.reads.places if place}, *names)


def _leaf(tensor):
    is_states = tensor.is_floating_point() and tensor.ndim == 3
    return tensor.detach().requires_grad_(is_states)
