"""The beginning of one sample of a model's inputs: for a look that takes seconds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import InvalidArgumentError
from attnzoo.spec.segments import describe

LENGTH = 256


def excerpt(inputs: Mapping[str, Any], length: int = LENGTH) -> dict[str, Any]:
    """The first real tokens of the sample that has most of them.

    Args:
        inputs: of a model's forward: tensors ``(batch, length)`` or ``(batch, length, dim)``, those of a decoder by
            names that begin with ``decoder_`` (``labels`` belong to it, where there are such), and scalars.
        length: how many tokens to keep at most, of a decoder too.

    Raises:
        InvalidArgumentError: a tensor of another shape, or something that holds tensors (a cache): names it.
    """
    decodes = any(name.startswith("decoder_") for name in inputs)
    chosen = _sample(inputs)
    cut: dict[str, Any] = {}
    for name, value in inputs.items():
        if value is None or isinstance(value, (bool, int, float, str)):
            cut[name] = value
            continue
        if not isinstance(value, Tensor) or value.ndim not in (2, 3):
            got = describe(value)
            raise InvalidArgumentError(f"inputs[{name!r}]", got, "with fast=True: a tensor (batch, length[, dim])")
        decoder = name.startswith("decoder_") or (decodes and name == "labels")
        start = _first_real(inputs, "decoder_attention_mask" if decoder else "attention_mask", chosen)
        cut[name] = value[chosen : chosen + 1, start : start + length]
    return cut


def _sample(inputs: Mapping[str, Any]) -> int:
    mask = inputs.get("attention_mask")
    return int((mask != 0).sum(1).argmax()) if isinstance(mask, Tensor) and mask.ndim == 2 else 0


def _first_real(inputs: Mapping[str, Any], name: str, sample: int) -> int:
    mask = inputs.get(name)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return 0
    return int(torch.argmax((mask[sample] != 0).int()))
