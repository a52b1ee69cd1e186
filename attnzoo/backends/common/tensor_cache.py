"""A cache of values computed from tensors. For example, all layers of one forward share a plan computed from a mask.

On the CPU the cache compares tensors by content. On other devices reading the content would wait for the device, so
the cache compares the identity of the tensor object and its version, which PyTorch increments at each in-place write.
A write through ``.data`` or DLPack does not increment the version, so the cache does not notice such a write. Models
and adapters do not write to masks, but make new masks.
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


class TensorCache:
    """Cache of the ``size`` most recently used values. The cache has only weak references to GPU tensors."""

    def __init__(self, size: int = 16) -> None:
        self._size, self._lock = size, threading.Lock()
        self._entries: OrderedDict[Hashable, tuple[tuple[weakref.ref[Tensor], ...], Any]] = OrderedDict()

    def get(self, key: Hashable, tensors: tuple[Tensor, ...], make: Callable[[], T]) -> T:
        """Return the value for ``key`` and ``tensors``. If the cache has none, call ``make()`` and store its result.

        The value must not share memory with ``tensors``.
        """
        watched = tuple(tensor for tensor in tensors if tensor.device.type != "cpu")
        if any(tensor.is_inference() for tensor in watched):
            return make()  # inference tensors have no version
        # A tensor made in inference mode cannot be saved for a backward. So inference mode has separate entries.
        whole = (key, torch.is_inference_mode_enabled(), *map(_state, tensors))
        with self._lock:
            entry = self._entries.get(whole)
            if entry is not None and all(ref() is tensor for ref, tensor in zip(entry[0], watched, strict=True)):
                self._entries.move_to_end(whole)
                value: T = entry[1]
                return value
        value = make()
        with self._lock:
            for dead in [known for known, (refs, _) in self._entries.items() if any(ref() is None for ref in refs)]:
                del self._entries[dead]
            self._entries[whole] = (tuple(map(weakref.ref, watched)), value)
            while len(self._entries) > self._size:
                self._entries.popitem(last=False)
        return value


def _state(tensor: Tensor) -> Hashable:
    """Return a cache key for a tensor: the content on the CPU, the identity and version on other devices."""
    if tensor.device.type == "cpu":
        return tensor.dtype, tensor.shape, tensor.detach().numpy().tobytes()
    return id(tensor), tensor._version
