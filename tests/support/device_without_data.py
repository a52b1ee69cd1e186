"""A device whose values nobody can read, on machines without a GPU: the device ``meta`` in the role of CUDA.

``meta`` tensors have no values, so every place where the host would wait for a device to read a value is visible. Fake
CUDA tensors would show this too, but on a CPU build of PyTorch a backward of fake CUDA tensors aborts the process.
"""

import copy
import inspect
import traceback
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import attnzoo
from attnzoo.registry import registry
from tests.support.compiled_triton import on_an_absent_card
from tests.support.models import FAMILIES

ROOT = Path(__file__).parents[2]
TRANSFORMS = ROOT / "attnzoo" / "spec" / "transforms.py"
# Operations that only make another view of a tensor or reserve memory. They launch nothing on a device.
_LAUNCH_NOTHING = {
    *("view", "_unsafe_view", "_reshape_alias", "transpose", "expand", "t", "permute", "slice", "select", "unsqueeze"),
    *("squeeze", "detach", "alias", "split", "split_with_sizes", "unbind", "unfold", "as_strided", "diagonal"),
    *("empty", "empty_like", "new_empty", "empty_strided", "lift_fresh"),
}
# What reads a value from a device. All return a number, a bool, or a tensor whose size depends on values.
_BOOLS = (torch.Tensor.__bool__, torch.equal)
_NUMBERS = (torch.Tensor.__int__, torch.Tensor.__index__, torch.Tensor.__float__, torch.Tensor.item)
_SIZES = (torch.Tensor.nonzero, torch.nonzero, torch.Tensor.tolist, torch.masked_select, torch.Tensor.masked_select)


class WaitError(AssertionError):
    """The size of a tensor depends on values of the device, so this test cannot go on."""


class Waits(TorchFunctionMode):
    """Records each place of attnzoo where Python reads a value of the device.

    The answers are those of a mask that hides nothing: 1 for a number, False for ``any``, otherwise True.
    """

    def __init__(self):
        super().__init__()
        self.places = []
        self._any = []  # results of ``any``

    def __torch_function__(self, func, types, args=(), kwargs=None):
        tensor = args[0] if args else None
        if isinstance(tensor, torch.Tensor) and tensor.is_meta:
            if func == torch.Tensor.is_meta.__get__:
                return False  # attnzoo refuses masks on meta, which have no values
            if func in _BOOLS or func in _NUMBERS:
                self.places.append(_place())
                if func in _BOOLS:
                    return not any(tensor is result for result in self._any)
                return 1.0 if func is torch.Tensor.__float__ else 1
            if func is torch.Tensor.any:
                self._any.append(func(*args, **(kwargs or {})))
                return self._any[-1]
            has_flags = func is torch.Tensor.__getitem__ and any(map(_is_flags, _indices(args[1])))
            if func in _SIZES or has_flags:
                raise WaitError(_place())
        return func(*args, **(kwargs or {}))


def _indices(index):
    return index if isinstance(index, tuple) else (index,)


def _is_flags(index):
    return isinstance(index, torch.Tensor) and index.dtype == torch.bool


def _place():
    """Return the innermost function outside of PyTorch on the stack, with its file, or None if it is not attnzoo's.

    Functions that read for others do not count.
    """
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path in (Path(__file__), TRANSFORMS) or path.is_relative_to(Path(torch.__file__).parent):
            continue
        inside = any(path.is_relative_to(ROOT / folder) for folder in ("attnzoo", "adapters"))
        return f"{path.relative_to(ROOT)}: {frame.name}" if inside else None
    return None


class _Launches(TorchDispatchMode):
    """Appends the name of each operation that launches a kernel."""

    def __init__(self, names):
        super().__init__()
        self._names = names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in _LAUNCH_NOTHING:
            self._names.append(name)
        return func(*args, **(kwargs or {}))


@dataclass
class Ran:
    """What one call of a module did: where it waited, and what it launched.

    The projections of the module are among the launches. Kernels of Triton have names that end in ``_kernel``.
    """

    waits: set[str] = field(default_factory=set)
    forward: list[str] = field(default_factory=list)
    backward: list[str] = field(default_factory=list)


@contextmanager
def readable_by_nobody():
    """Let the backends take tensors on ``meta``, and record the launches of Triton. Yields the list of names."""
    launches: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(registry.replaced_by(registry.copy()))
        for name in ("sdpa", "triton"):
            cls = registry.backend_class(name)
            devices = cls.capabilities.devices | {"meta"}
            stack.enter_context(mock.patch.object(cls, "capabilities", replace(cls.capabilities, devices=devices)))
            stack.enter_context(mock.patch.object(cls, "unavailable", classmethod(lambda cls: None)))
        # These refuse meta by purpose: there, weights and masks have no values.
        stack.enter_context(mock.patch("attnzoo.patching.plan._check_loaded", lambda *_: None))
        stack.enter_context(mock.patch.object(torch, "is_autocast_enabled", lambda *_: False))  # it refuses meta
        stack.enter_context(on_an_absent_card((9, 0), lambda kernel, *_: launches.append(kernel.fn.__name__)))
        yield launches


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
    with readable_by_nobody() as launches:
        module = copy.deepcopy(module).to("meta").train(False)
        args, kwargs = (tree_map(_without_data, part) for part in (args, kwargs))
        with attnzoo.patch(module, backend):
            for _ in range(2):
                launches.clear()
                with Waits() as waits, _Launches(launches):
                    output = module(*args, **kwargs)
                    while not isinstance(output, torch.Tensor):
                        output = output[0]
                    count = len(launches)
                    if output.requires_grad:
                        output.backward(torch.empty_like(output))
    return Ran({place for place in waits.places if place}, launches[:count], launches[count:])


def _without_data(value):
    if not isinstance(value, torch.Tensor):
        return value
    new = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return new.requires_grad_(value.is_floating_point() and value.ndim == 3)  # hidden states
