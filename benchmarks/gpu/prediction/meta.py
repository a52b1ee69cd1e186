"""The device ``meta`` in the role of CUDA: tensors without values, so every read of a value becomes visible.

Fake CUDA tensors would show this too, but on a CPU build of PyTorch a backward of fake CUDA tensors aborts the process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from attnzoo.benchmarks.gpu.prediction.absent_card import Launch, on_an_absent_card
from attnzoo.registry import registry

# What reads a value from a device. All return a number, a bool, or a tensor whose size depends on values.
_BOOLS = (torch.Tensor.__bool__, torch.equal)
_NUMBERS = (torch.Tensor.__int__, torch.Tensor.__index__, torch.Tensor.__float__, torch.Tensor.item)
_SIZES = (torch.Tensor.nonzero, torch.nonzero, torch.Tensor.tolist, torch.masked_select, torch.Tensor.masked_select)


class Reads(TorchFunctionMode):
    """Answers where Python reads a value of the device ``meta``. Subclasses say what they do about a read.

    ``torch.tensor`` counts as a read: the host waits until its numbers are on the device.

    The answers are those of a mask that hides nothing: 1 for a number, False for ``any``, otherwise True.
    """

    def __init__(self) -> None:
        super().__init__()
        self._any: list[Tensor] = []  # results of ``any``

    def value_read(self) -> None:
        """Handle that the host waits for a bool, for a number, or for a copy to the device."""
        raise NotImplementedError

    def size_read(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Return the result of an operation whose size depends on values."""
        raise NotImplementedError

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensor, kwargs = args[0] if args else None, kwargs or {}
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == "meta":
            self.value_read()
        if isinstance(tensor, Tensor) and tensor.is_meta:
            if func == torch.Tensor.is_meta.__get__:  # type: ignore[attr-defined]
                return False  # attnzoo refuses masks on meta, which have no values
            if func in _BOOLS or func in _NUMBERS:
                self.value_read()
                if func in _BOOLS:
                    return not any(tensor is result for result in self._any)
                return 1.0 if func is torch.Tensor.__float__ else 1
            if func is torch.Tensor.any:
                self._any.append(func(*args, **kwargs))
                return self._any[-1]
            if func in _SIZES or (func is torch.Tensor.__getitem__ and any(map(_is_flags, _indices(args[1])))):
                return self.size_read(func, args, kwargs)
        return func(*args, **kwargs)


def _indices(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _is_flags(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool


@contextmanager
def readable_by_nobody(launch: Launch) -> Iterator[None]:
    """Let backends take tensors on ``meta``, and let launches of Triton call ``launch(kernel, grid, args, kwargs)``."""
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
        stack.enter_context(on_an_absent_card((9, 0), launch))
        yield


def without_values(tensor: Tensor) -> Tensor:
    """Return a tensor on ``meta`` with the same shape, strides and dtype."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
