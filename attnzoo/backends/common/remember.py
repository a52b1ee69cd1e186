"""What was made from masks last: for what all layers of a forward share.

On the CPU a mask is known by its content. Elsewhere looking at it would wait for the device: there it is known by
identity and version, while it is alive. Writing through ``.data`` or DLPack raises no version and goes unseen there;
models and adapters make their masks anew in every forward.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_KEPT = 16


class Memory:
    """Values by key and tensors; tensors on other devices are held weakly."""

    def __init__(self, kept: int = _KEPT) -> None:
        self._kept, self._lock = kept, threading.Lock()
        self._made: OrderedDict[Hashable, tuple[tuple[weakref.ref[Tensor], ...], Any]] = OrderedDict()

    def get(self, key: Hashable, tensors: tuple[Tensor, ...], make: Callable[[], T]) -> T:
        """``make()``, or what it gave for the same key and tensors not long ago. It must not share their memory."""
        watched = tuple(tensor for tensor in tensors if tensor.device.type != "cpu")
        if any(tensor.is_inference() for tensor in watched):
            return make()  # inference tensors count no versions
        # What is made in inference mode cannot be saved for a backward.
        whole = (key, torch.is_inference_mode_enabled(), *map(_state, tensors))
        with self._lock:
            found = self._made.get(whole)
            if found is not None and all(ref() is tensor for ref, tensor in zip(found[0], watched, strict=True)):
                self._made.move_to_end(whole)
                value: T = found[1]
                return value
        value = make()
        with self._lock:
            for known in [known for known, (refs, _) in self._made.items() if any(ref() is None for ref in refs)]:
                del self._made[known]
            self._made[whole] = (tuple(map(weakref.ref, watched)), value)
            while len(self._made) > self._kept:
                self._made.popitem(last=False)
        return value


def _state(tensor: Tensor) -> Hashable:
    """Equal for tensors of equal content on the CPU, and for one tensor that was not written to elsewhere."""
    if tensor.device.type == "cpu":
        return tensor.dtype, tensor.shape, tensor.detach().numpy().tobytes()
    return id(tensor), tensor._version
