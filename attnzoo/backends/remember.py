"""What was made from tensors last, while they are alive and unchanged: for what all layers of a forward share.

Changes are told by a tensor's version. Writing through ``.data``, numpy or DLPack raises no version, so that it goes
unseen here; models and adapters make their masks anew in every forward.
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
    """Values by key and tensors; the tensors are compared by identity and version, and held weakly."""

    def __init__(self, kept: int = _KEPT) -> None:
        self._kept, self._lock = kept, threading.Lock()
        self._made: OrderedDict[Hashable, tuple[tuple[weakref.ref[Tensor], ...], Any]] = OrderedDict()

    def get(self, key: Hashable, tensors: tuple[Tensor, ...], make: Callable[[], T]) -> T:
        """``make()``, or what it gave for the same key and tensors not long ago. It must not share their memory."""
        if any(tensor.is_inference() for tensor in tensors):
            return make()  # inference tensors count no versions
        # What is made in inference mode cannot be saved for a backward.
        mode = torch.is_inference_mode_enabled()
        whole = (key, mode, *((id(tensor), tensor._version) for tensor in tensors))
        with self._lock:
            found = self._made.get(whole)
            if found is not None and all(ref() is tensor for ref, tensor in zip(found[0], tensors, strict=True)):
                self._made.move_to_end(whole)
                value: T = found[1]
                return value
        value = make()
        with self._lock:
            for known in [known for known, (refs, _) in self._made.items() if any(ref() is None for ref in refs)]:
                del self._made[known]
            self._made[whole] = (tuple(weakref.ref(tensor) for tensor in tensors), value)
            while len(self._made) > self._kept:
                self._made.popitem(last=False)
        return value
