"""The interface of a kernel for packed sequences, and functions that import and check optional packages.

To add such a kernel, copy ``varlen_kernel.py`` and list the class in the ``kernels`` of a backend (``flash.py``).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from attnzoo.backends.common.union import Grads
from attnzoo.backends.varlen.calls import Sequences, may_hide_keys, needs_no_union
from attnzoo.errors import Refusal, raise_interrupts
from attnzoo.spec.segments import Request


class Inputs(NamedTuple):
    """The arguments of a kernel: ``query`` ``(rows, heads, dim)``, ``key`` and ``value`` ``(rows, kv_heads, dim)``."""

    query: Tensor
    key: Tensor
    value: Tensor
    sequences: Sequences
    scale: float
    dropout: float


class PackedKernel:
    """A kernel for packed sequences. All tensors have the same ``dim``, a multiple of 8.

    Query head ``h`` uses key head ``h // (heads // kv_heads)``.

    Class attributes:
        name: the kernel name in reports.
        dtypes: the supported dtypes of query, key and value.
        max_dim: the largest supported ``dim``.
        dropout: whether the kernel supports dropout.
        windows: whether the kernel supports windows. If False, each query of a call sees all keys of its sequence, or
            all keys up to its position.
    """

    name: ClassVar[str]
    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset({torch.bfloat16, torch.float16})
    max_dim: ClassVar[int] = 256
    dropout: ClassVar[bool] = False
    windows: ClassVar[bool] = True

    @classmethod
    def unavailable(cls) -> str | None:
        """Return why the kernel cannot run on this machine and what to do, or None if the kernel can run."""
        raise NotImplementedError

    @classmethod
    def parts_unavailable(cls) -> str | None:
        """Return why :meth:`forward` and :meth:`backward` cannot run here, or None. :meth:`attend` may still run."""
        return None

    @classmethod
    def refusals(cls, request: Request) -> tuple[Refusal, ...]:
        """Return a refusal for each field of the request that the kernel does not support."""
        refusals = []
        hides = any(map(may_hide_keys, request.segments))
        dim = max(request.head_dim, request.value_dim)
        if dim + hides > cls.max_dim:
            allowed = f"at most {cls.max_dim - 1} if the kernel must hide keys" if hides else f"at most {cls.max_dim}"
            refusals.append(Refusal("head_dim", str(dim), allowed))
        if request.dtype not in cls.dtypes:
            names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in cls.dtypes))
            refusals.append(
                Refusal("dtype", str(request.dtype).removeprefix("torch."), f"{names} with kernel {cls.name}")
            )
        if request.dropout and not cls.dropout:
            refusals.append(Refusal("dropout", f"a probability above 0 with kernel {cls.name}", "dropout=0.0"))
        return tuple(refusals)

    @classmethod
    def missing_parts(cls, request: Request) -> tuple[Refusal, ...]:
        """Return a refusal if the request needs a union of parts and the kernel cannot run :meth:`forward`."""
        if needs_no_union(request.segments) or (why := cls.parts_unavailable()) is None:
            return ()
        return (
            Refusal(
                "segments", f"several segments or hidden keys, but {why}", "one segment, no key mask, no SortedChunks"
            ),
        )

    @classmethod
    def attend(cls, inputs: Inputs) -> Tensor:
        """Return the differentiable output ``(rows, heads, dim)`` of the attention within each sequence."""
        raise NotImplementedError

    @classmethod
    def forward(cls, inputs: Inputs) -> tuple[Tensor, Tensor, Any]:
        """Return the output (not differentiable), lse ``(heads, rows)`` float32, and a state for :meth:`backward`."""
        raise NotImplementedError

    @classmethod
    def backward(cls, inputs: Inputs, grad_out: Tensor, out: Tensor, lse: Tensor, state: Any) -> Grads:
        """Return the gradients of query, key and value. ``out`` and ``lse`` are merged over all calls of the union."""
        raise NotImplementedError


def no_device(capability: tuple[int, int] = (8, 0)) -> str | None:
    """Return why no CUDA device of at least this compute capability can be used, or None if one can be used."""
    if not torch.cuda.is_available():
        without = "is built without CUDA" if torch.version.cuda is None else "finds no CUDA device"
        return f"torch {torch.__version__} {without}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built for another device than CUDA"
    actual = torch.cuda.get_device_capability()
    if actual < capability:
        name = torch.cuda.get_device_name()
        return f"{name} has compute capability {actual[0]}.{actual[1]}; needed: >= {capability[0]}.{capability[1]}"
    return None


def example_device() -> torch.device | None:
    """Return the device for a small test call of a package, or None if no device is usable."""
    return torch.device("cuda") if no_device() is None else None


def import_package(name: str, install: str) -> tuple[ModuleType | None, str]:
    """Import a module. Return the module and "", or None and the reason. ``install`` is an argument of pip install."""
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name), ""
    except BaseException as error:
        raise_interrupts(error)
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            return None, f"{package} is not installed: pip install {install}"
        return None, f"{package} cannot be imported: {type(error).__name__}: {error}"


def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the parameter names of a Python function or a torch operator."""
    overload = getattr(function, "default", None)
    if isinstance(overload, torch._ops.OpOverload):
        return tuple(argument.name for argument in overload._schema.arguments)
    return tuple(inspect.signature(function).parameters)


def changed_signature(module: ModuleType | Any, expected: Mapping[str, tuple[str, ...]], whose: str) -> str | None:
    """Return why a function of ``module`` differs from ``expected``, or None if all functions are as expected.

    ``expected`` maps the name of each function to the names of its first parameters. ``whose`` is the name of the
    module in the returned text. If reading a broken package raises, the text contains this exception.
    """
    for name, names in expected.items():
        try:
            function = getattr(module, name, None)
            if function is None:
                return f"{whose} has no {name}"
            actual = parameters(function)
        except BaseException as error:
            raise_interrupts(error)
            return f"the parameters of {name} from {whose} cannot be read: {type(error).__name__}: {error}"
        if actual[: len(names)] != names:
            return f"{whose} changed the parameters of {name} to {', '.join(actual)}"
    return None
