"""Seams of modules that attend nothing, but make larger tensors around attention than they need, or take users' masks.

``patch`` takes such a module over together with the attention it belongs to. The takeover
changes memory and messages, never results. So a module whose forward was overridden, by a subclass or on the instance,
is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from attnzoo.adapter import Attend, Forward, PatchPoint
from attnzoo.originals import slots
from attnzoo.originals.fingerprint import locate

# Fewest tokens of a slice: their hidden layers fit in tens of MiB, and matrix products are no slower.
TOKENS_AT_ONCE = 2048


def companion(
    cls: str,
    bind: Callable[[type, Attend], Forward],
    verified: Mapping[str, tuple[str, ...]],
    describe: str,
    shared_in: str | None = None,
) -> PatchPoint:
    """Return the point of a module that attends nothing.

    Args:
        cls: ``"package.module:Class"`` of the module.
        bind, verified, shared_in: as in :class:`~attnzoo.adapter.PatchPoint`.
        describe: what the module does, for people.
    """

    def runs_the_original(module: Any) -> bool:
        return type(module).forward is locate(f"{cls}.forward") and not slots.is_foreign(module)

    return PatchPoint(
        cls=cls,
        bind=bind,
        when=runs_the_original,
        describe=lambda module: describe,
        verified=verified,
        shared_in=shared_in,
        attends=False,
    )


def by_slices(module: Any, attend: Attend, states: Tensor) -> Tensor:
    """Return what the module's own forward gives for ``states`` ``(batch, length, embed)``, computed slice by slice.

    For a module that treats tokens alike. All tokens at once with gradients, which keep the hidden layers of all tokens
    anyway, and in training, where dropout would draw other numbers.
    """
    own, count = type(module).forward, states.shape[1] // TOKENS_AT_ONCE
    if count < 2 or torch.is_grad_enabled() or module.training:
        output: Tensor = own(module, states)
        return output
    return torch.cat([own(module, part) for part in states.tensor_split(count, dim=1)], dim=1)
