"""What a kernel for packed sequences has to offer, and how its package is looked up."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from attnzoo.backends.varlen.calls import Sequences, disjoint, hides
from attnzoo.errors import Refusal, raise_interrupts
from attnzoo.spec.segments import Request


class Inputs(NamedTuple):
    """What a kernel is called with: ``query`` ``(rows, heads, dim)``, ``key`` and ``value`` with ``kv_heads``."""

    query: Tensor
    key: Tensor
    value: Tensor
    sequences: Sequences
    scale: float
    dropout: float


class Kernel:
    """A kernel on packed sequences. Tensors are ``(rows, heads, dim)``, all of one dim, a multiple of 8.

    Query head ``h`` uses key head ``h // (heads // kv_heads)``.

    Class attributes:
        name: what sites report.
        dtypes: of query, key and value.
        max_dim: the largest dim.
        dropout: drops softmax weights.
        windows: takes windows, and other sequences in which two extents or one after a query are limited.
    """

    name: ClassVar[str]
    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset({torch.bfloat16, torch.float16})
    max_dim: ClassVar[int] = 256
    dropout: ClassVar[bool] = False
    windows: ClassVar[bool] = True

    @classmethod
    def unavailable(cls) -> str | None:
        """Why the kernel cannot be used here and what to do, or None."""
        raise NotImplementedError

    @classmethod
    def parts_unavailable(cls) -> str | None:
        """Why :meth:`forward` and :meth:`backward` cannot be used, though :meth:`attend` can; or None."""
        return None

    @classmethod
    def refusals(cls, request: Request) -> tuple[Refusal, ...]:
        """What the kernel does not take of a request that its backend takes."""
        found = []
        hiding = any(map(hides, request.segments))
        dim = max(request.head_dim, request.value_dim)
        if dim + hiding > cls.max_dim:
            most = f"at most {cls.max_dim - 1}, and one more to hide keys" if hiding else f"at most {cls.max_dim}"
            found.append(Refusal("head_dim", str(dim), most))
        if request.dtype not in cls.dtypes:
            names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in cls.dtypes))
            found.append(Refusal("dtype", str(request.dtype).removeprefix("torch."), f"{names} with {cls.name}"))
        if request.dropout and not cls.dropout:
            found.append(Refusal("dropout", f"requested of {cls.name}", "dropout=0.0"))
        return tuple(found)

    @classmethod
    def lacking(cls, request: Request) -> tuple[Refusal, ...]:
        """What the kernel does not take as it is installed here."""
        if disjoint(request.segments) or (why := cls.parts_unavailable()) is None:
            return ()
        return (Refusal("segments", f"parts to unite, and {why}", "one segment without a key mask"),)

    @classmethod
    def attend(cls, inputs: Inputs) -> Tensor:
        """Attention ``(rows, heads, dim)`` within each sequence, with gradients."""
        raise NotImplementedError

    @classmethod
    def forward(cls, inputs: Inputs) -> tuple[Tensor, Tensor, Any]:
        """The same without gradients: output, ``lse`` ``(heads, rows)`` float32, and what :meth:`backward` needs."""
        raise NotImplementedError

    @classmethod
    def backward(
        cls, inputs: Inputs, grad_out: Tensor, out: Tensor, lse: Tensor, state: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value, given the output and lse of the whole union.

        ``state`` is what :meth:`forward` gave.
        """
        raise NotImplementedError


def no_device(capability: tuple[int, int] = (8, 0)) -> str | None:
    """Why there is no device for such kernels, or None. ``capability`` is the least one they take."""
    if not torch.cuda.is_available():
        without = "is built without CUDA" if torch.version.cuda is None else "sees no CUDA device"
        return f"torch {torch.__version__} {without}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built for another device than CUDA"
    found = torch.cuda.get_device_capability()
    if found < capability:
        name = torch.cuda.get_device_name()
        return f"{name} has compute capability {found[0]}.{found[1]}; needed: {capability[0]}.{capability[1]}"
    return None


def example_device() -> torch.device | None:
    """Where to put a small example that a package is asked about; None without a device, where CUDA stays untouched."""
    return torch.device("cuda") if no_device() is None else None


def import_package(name: str, install: str) -> tuple[ModuleType | None, str]:
    """A module of an optional package, or None and why not: it may be missing, or raise anything while it loads."""
    try:
        return importlib.import_module(name), ""
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if error.name == package:
            return None, f"{package} is not installed: pip install {install}"
        return None, f"{package} is broken: {type(error).__name__}: {error}"
    except BaseException as error:
        raise_interrupts(error)
        return None, f"{name.partition('.')[0]} is broken: {type(error).__name__}: {error}"


def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the parameters of a Python function or of a torch operator."""
    overload = getattr(function, "default", None)
    if isinstance(overload, torch._ops.OpOverload):
        return tuple(argument.name for argument in overload._schema.arguments)
    return tuple(inspect.signature(function).parameters)


def drift(module: ModuleType | Any, expected: dict[str, tuple[str, ...]], whose: str) -> str | None:
    """What a module lacks of the functions expected, each with its first parameters in order; or None.

    Like its import, looking at a package may raise anything: that is what is wrong with this one, and with no other.
    """
    for name, names in expected.items():
        try:
            function = getattr(module, name, None)
            if function is None:
                return f"{whose} has no {name}"
            got = parameters(function)
        except BaseException as error:
            raise_interrupts(error)
            return f"{whose}'s {name} does not tell its parameters: {type(error).__name__}: {error}"
        if got[: len(names)] != names:
            return f"{whose} changed the parameters of {name} to {', '.join(got)}"
    return None
