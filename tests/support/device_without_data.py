"""Run attention modules on a device whose values nobody can read, and list where attnzoo would wait for a device."""

import copy
import inspect
import traceback
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch.utils._pytree import tree_map_only

import attnzoo
from attnzoo.backends.flex import backend as flex
from attnzoo.backends.flex.backend import FlexBackend
from attnzoo.backends.varlen import calls
from attnzoo.backends.varlen.flash import FlashBackend
from attnzoo.benchmarks.cases import ModuleCall
from attnzoo.benchmarks.gpu import prediction
from attnzoo.benchmarks.gpu.prediction.count import run
from attnzoo.benchmarks.gpu.prediction.meta import Reads
from tests.support.models import FAMILIES

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
TRANSFORMS = ROOT / "attnzoo" / "spec" / "transforms.py"
READERS = tuple(Path(module.__file__).resolve().parent for module in (torch, prediction))


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


@contextmanager
def _more_backends():
    """Let FlexAttention and FlashAttention run on the device without data.

    Another operator replaces compiled FlexAttention. FlashAttention reads which tokens are padding: here, none are.
    """

    def compiled(form):
        def attend(query, key, value, lists, terms):
            scores = query.sum(-1, keepdim=True) + (key.sum() + value.sum() + terms.table.sum()).to(query.dtype)
            return scores.expand(*query.shape[:3], value.shape[3])

        return attend

    def range_of(mask):
        int(mask.sum())  # a read
        return [calls._Range(0, mask.shape[1], mask.shape[1])] * mask.shape[0]

    def unordered_calls(attention, number, queries, keys):
        masks = (attention.query_mask, attention.segments[number].key_mask)
        any(int(mask.sum()) for mask in masks if mask is not None)  # a read
        sequences = calls.Sequences(tuple(queries.lens), tuple(keys.lens), attention.query.device)
        return [calls.Call(number, sequences, queries.rows, keys.rows)]

    def ranges(masks):
        return [None if mask is None else range_of(mask) for mask in masks]

    with ExitStack() as stack:
        for cls in (FlexBackend, FlashBackend):
            devices = cls.capabilities.devices | {"meta"}
            stack.enter_context(mock.patch.object(cls, "capabilities", replace(cls.capabilities, devices=devices)))
            stack.enter_context(mock.patch.object(cls, "unavailable", classmethod(lambda cls: None)))
        stack.enter_context(mock.patch.dict(flex.BLOCK_SHAPES, meta=flex.BLOCK_SHAPES["cuda"]))
        stack.enter_context(mock.patch.object(flex, "compiled_kernel", compiled))
        stack.enter_context(mock.patch.object(torch, "autocast", lambda *_, **__: nullcontext()))  # it refuses meta
        stack.enter_context(mock.patch.object(calls, "_ranges", ranges))
        stack.enter_context(mock.patch.object(calls, "_unordered_calls", unordered_calls))
        yield


def _place():
    """Return the innermost function outside of PyTorch on the stack, with its file, or None if it is not attnzoo's.

    Functions that read for others do not count.
    """
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename).resolve()  # attnzoo/adapters may be a link
        if path in (HERE, TRANSFORMS) or any(map(path.is_relative_to, READERS)):
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


def run_module(module, args, kwargs, backend, train=True):
    """Run a module twice on the device without data, and return what the second call did.

    With ``train``, a backward follows the forward. FlashAttention runs in bfloat16.
    """
    dtype = torch.bfloat16 if backend == FlashBackend.name else torch.float32
    module = copy.deepcopy(module).train(False).to(dtype)
    args, kwargs = tree_map_only(torch.Tensor, partial(_leaf, dtype), (args, kwargs))
    with _more_backends():
        recorded = run(ModuleCall(module, "*", module, args, kwargs, []), backend, train, Waits)
    names = ([work.name for work in works] for works in (recorded.forward, recorded.backward))
    return Ran({place for place in recorded.reads.places if place}, *names)


def _leaf(dtype, tensor):
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().to(dtype).requires_grad_(tensor.ndim == 3)
