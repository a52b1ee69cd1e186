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
    sample = _sample(inputs)
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


def remark(inputs: Mapping[str, Any], length: int = LENGTH) -> str:
    """Return which tokens of which sample :func:`excerpt` keeps, or ``""`` if it keeps all.

    For example: ``"checked: the first 256 of 900 tokens of sample 1 of 2"``. Padding tokens do not count.
    """
    sample = _sample(inputs)
    cut, parts, samples = excerpt(inputs, length), [], 1
    for prefix, what in (("", "tokens"), ("decoder_", "decoder tokens")):
        names = (prefix + name for name in ("attention_mask", "input_ids", "inputs_embeds"))
        name = next((name for name in names if isinstance(inputs.get(name), Tensor)), None)
        if name is None:
            continue
        kept, total = (_real(values[name], name, row) for values, row in ((cut, 0), (inputs, sample)))
        samples = max(samples, len(inputs[name]))
        parts.append(f"the first {kept} of {total} {what}" if kept < total else f"all {total} {what}")
    text = f"checked: {' and '.join(parts)}" + (f" of sample {sample + 1} of {samples}" if samples > 1 else "")
    masks = (_mask(inputs, "attention_mask"), _mask(cut, "attention_mask"))
    had_padding, has_padding = (mask is not None and not bool((mask != 0).all()) for mask in masks)
    lost_padding = had_padding and not has_padding
    text += ", without padding" if lost_padding else ""
    return text if samples > 1 or lost_padding or "the first" in text else ""


def _sample(inputs: Mapping[str, Any]) -> int:
    """Return the index of the sample that has the most real tokens."""
    mask = _mask(inputs, "attention_mask")
    return 0 if mask is None else int((mask != 0).sum(1).argmax())


def _real(value: Tensor, name: str, sample: int) -> int:
    """Return the number of real tokens of a sample."""
    return int((value[sample] != 0).sum()) if name.endswith("mask") and value.ndim == 2 else value.shape[1]


def _mask(inputs: Mapping[str, Any], name: str) -> Tensor | None:
    mask = inputs.get(name)
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
