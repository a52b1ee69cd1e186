"""Describe the call of an attention module by the properties that decide whether the model's code is faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnzoo.adapter import PatchPoint
from attnzoo.auto.measurements import SizeClass, mode_of
from attnzoo.spec.patterns import power_of_two

FORWARD, TRAINING, DECODING = mode_of(grad=False), mode_of(grad=True), "decoding"


class ModuleCall(NamedTuple):
    """The properties of one call of an attention module.

    Attributes:
        mode: ``"forward"``, ``"forward+backward"``, or ``"decoding"`` (one query and a cache).
        batch, q_len: the first two sizes of the module's hidden states.
        kv_len: the number of keys, rounded up to a power of two if the call has a cache.
        device: the type of the device.
    """

    mode: str
    batch: int
    q_len: int
    kv_len: int
    device: str

    @property
    def size(self) -> SizeClass:
        return SizeClass(power_of_two(self.batch), power_of_two(self.q_len), (power_of_two(self.kv_len),))


def hidden_states(point: PatchPoint, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the hidden states ``(batch, length, embed)`` of a call, or None if the call has other arguments."""
    states = point.states_of(args, kwargs)
    return states if isinstance(states, Tensor) and states.ndim == 3 else None


def drops_weights(point: PatchPoint, module: Any) -> bool:
    """Whether a call of the module drops softmax weights."""
    return bool(module.training and point.dropout(module) > 0.0)


def describe_call(point: PatchPoint, module: Any, states: Tensor, kwargs: Mapping[str, Any]) -> ModuleCall:
    """Return the properties of a call of ``module`` with hidden states ``states``.

    A module in training mode always counts as training. Checkpointed and reversible layers run their forward once
    without and once with gradients. Both runs must select the same code, or dropout would differ between them.
    """
    return ModuleCall(*properties(point, module, states, kwargs))


def properties(
    point: PatchPoint, module: Any, states: Tensor, kwargs: Mapping[str, Any]
) -> tuple[str, int, int, int, str]:
    """Return the fields of :func:`describe_call`. Every call of a patched module runs this, so it must be fast."""
    batch, q_len, _ = states.shape
    source = kwargs.get("key_value_states")
    cache = point.cache_in(kwargs)
    kv_len = q_len if source is None else source.shape[1]
    if cache is not None and source is None:
        kv_len = 1 << (q_len + point.cached_tokens(module, cache) - 1).bit_length()  # rounded up to a power of two
    if module.training or torch.is_grad_enabled():
        mode = TRAINING
    else:
        mode = DECODING if q_len == 1 and cache is not None else FORWARD
    return mode, batch, q_len, kv_len, states.device.type
