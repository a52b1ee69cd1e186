"""Shorten the inputs of a model to the first tokens of one sample, for ``verify(fast=True)``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import InvalidArgumentError
from attnzoo.spec.segments import describe

LENGTH = 256


def excerpt(inputs: Mapping[str, Any], length: int = LENGTH) -> dict[str, Any]:
    """Return inputs with only the first ``length`` real tokens of the sample that has the most real tokens.

    Raise InvalidArgumentError if an input is neither None nor a scalar nor a tensor ``(batch, length[, dim])``. If the
    name of an input begins with ``decoder_``, the input ``labels`` is cut like the inputs of the decoder.
    """
    has_decoder = any(name.startswith("decoder_") for name in inputs)
    mask = _mask(inputs, "attention_mask")
    sample = 0 if mask is None else int((mask != 0).sum(1).argmax())
    cut: dict[str, Any] = {}
    for name, value in inputs.items():
        if value is None or isinstance(value, (bool, int, float, str)):
            cut[name] = value
            continue
        if not isinstance(value, Tensor) or value.ndim not in (2, 3):
            allowed = "with fast=True, a tensor of shape (batch, length) or (batch, length, dim), a scalar, or None"
            raise InvalidArgumentError(f"inputs[{name!r}]", describe(value), allowed)
        of_decoder = name.startswith("decoder_") or (has_decoder and name == "labels")
        mask = _mask(inputs, "decoder_attention_mask" if of_decoder else "attention_mask")
        start = 0 if mask is None else int(torch.argmax((mask[sample] != 0).int()))
        cut[name] = value[sample : sample + 1, start : start + length]
    return cut


def _mask(inputs: Mapping[str, Any], name: str) -> Tensor | None:
    mask = inputs.get(name)
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
