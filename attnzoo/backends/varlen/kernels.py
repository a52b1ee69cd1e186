"""The interface of a kernel for packed sequences, and how its optional package is looked up.

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
    """A kernel on packed sequences. All tensors have one ``dim``, a multiple of 8.

    Query head ``h`` uses key head ``h // (heads // kv_heads)``.

    Class attributes:
        name: what sites report.
        dtypes: of query, key and value.
        max_dim: the largest dim.
        dropout: whether it can drop softmax weights.
        windows: whether it supports windows; if not, it gets only causal sequences and sequences without limits.
    """

    name: ClassVar[str]
    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset({torch.bfloat16, torch.float16})
    max_dim: ClassVar[int] = 256
    dropout: ClassVar[bool] = False
    windows: ClassVar[bool] = True

    @classmethod
    def unavailable(cls) -> str | None:
        """Return why the kernel cannot be used here and what to do, or None."""
        raise NotImplementedError

    @classmethod
    def parts_unavailable(cls) -> str | None:
        """Return why :meth:`forward` and :meth:`backward` cannot be used although :meth:`attend` can, or None."""
        return None

    @classmethod
    def refusals(cls, request: Request) -> tuple[Refusal, ...]:
        """Return what the kernel cannot do of a request that its backend accepts."""
        refusals = []
        hides = any(map(may_hide_keys, request.segments))
        dim = max(request.head_dim, request.value_dim)
        if dim + hides > cls.max_dim:
            allowed = f"at most {cls.max_dim - 1}, and one more to hide keys" if hides else f"at most {cls.max_dim}"
            refusals.append(Refusal("head_dim", str(dim), allowed))
        if request.dtype not in cls.dtypes:
            names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in cls.dtypes))
            refusals.append(Refusal("dtype", str(request.dtype).removeprefix("torch."), f"{names} with {cls.name}"))
        if request.dropout and not cls.dropout:
            refusals.append(Refusal("dropout", f"requested of {cls.name}", "dropout=0.0"))
        return tuple(refusals)

    @classmethod
    def missing_parts(cls, request: Request) -> tuple[Refusal, ...]:
        """Return a refusal if the request needs a union and the installed kernel cannot compute parts."""
        if needs_no_union(request.segments) or (why := cls.parts_unavailable()) is None:
            return ()
        return (Refusal("segments", f"parts to unite, and {why}", "one segment without a key mask"),)

    @classmethod
    def attend(cls, inputs: Inputs) -> Tensor:
        """Return the attention ``(rows, heads, dim)`` within each sequence, with gradients."""
        raise NotImplementedError

    @classmethod
    def forward(cls, inputs: Inputs) -> tuple[Tensor, Tensor, Any]:
        """Return the same without gradients, lse ``(heads, rows)`` float32, and a state for :meth:`backward`."""
        raise NotImplementedError

    @classmethod
    def backward(cls, inputs: Inputs, grad_out: Tensor, out: Tensor, lse: Tensor, state: Any) -> Grads:
        """Return the gradients of query, key and value, from out and lse of the whole union and the forward's state."""
        raise NotImplementedError


def no_device(capability: tuple[int, int] = (8, 0)) -> str | None:
    """Return why there is no device of at least this compute capability, or None."""
    if not torch.cuda.is_available():
        without = "is built without CUDA" if torch.version.cuda is None else "sees no CUDA device"
        return f"torch {torch.__version__} {without}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built for another device than CUDA"
    actual = torch.cuda.get_device_capability()
    if actual < capability:
        name = torch.cuda.get_device_name()
        return f"{name} has compute capability {actual[0]}.{actual[1]}; needed: {capability[0]}.{capability[1]}"
    return None


def example_device() -> torch.device | None:
    """Return the device for a small example to try a package on, or None; without a device CUDA stays uninitialised."""
    return torch.device("cuda") if no_device() is None else None


def import_package(name: str, install: str) -> tuple[ModuleType | None, str]:
    """Return a module of an optional package, or None and the reason: an import may raise anything."""
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name), ""
    except BaseException as error:
        raise_interrupts(error)
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            return None, f"{package} is not installed: pip install {install}"
        return None, f"{package} is broken: {type(error).__name__}: {error}"


def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the parameter names of a Python function or a torch operator."""
    overload = getattr(function, "default", None)
    if isinstance(overload, torch._ops.OpOverload):
        return tuple(argument.name for argument in overload._schema.arguments)
    return tuple(inspect.signature(function).parameters)


def changed_signature(module: ModuleType | Any, expected: Mapping[str, tuple[str, ...]], whose: str) -> str | None:
    """Return which expected function a module lacks, or has with other first parameters; or None.

    Like the import, a look at a broken package may raise anything; that is then the reason not to use it.
    """
    for name, names in expected.items():
        try:
            function = getattr(module, name, None)
            if function is None:
                return f"{whose} has no {name}"
            actual = parameters(function)
        except BaseException as error:
            raise_interrupts(error)
            return f"{whose}'s {name} hides its parameters: {type(error).__name__}: {error}"
        if actual[: len(names)] != names:
            return f"{whose} changed the parameters of {name} to {', '.join(actual)}"
    return None
