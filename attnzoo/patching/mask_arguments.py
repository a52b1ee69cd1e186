"""Check the masks that users pass to a model.

A model expands masks to grids ``(batch, 1, q_len, kv_len)``. If the user passes a list, an array or a mask of a wrong
shape, the model raises an unclear error or accepts the mask. A patched attention cannot check the user's mask, because
it gets only the grid. So an adapter describes the mask arguments of the model (:class:`MaskArgument`), and a
:class:`MaskCheckPoint` checks these arguments before the model builds a grid or fills a cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnzoo.adapter import Attend, Forward
from attnzoo.errors import InvalidArgumentError
from attnzoo.patching.companions import CompanionPoint
from attnzoo.spec.segments import describe
from attnzoo.spec.transforms import holds, readable


@dataclass(frozen=True)
class MaskArgument:
    """Description of a mask argument ``(batch, length)`` of a module.

    Attributes:
        tokens: names of arguments. The first of them that is a tensor contains the tokens ``(batch, length, ...)``.
        public_name: the name by which users pass the mask. Empty if users pass the module's argument directly.
        allows_grid: whether the mask may also have the shape ``(batch or 1, heads or 1, q_len or 1, kv_len or 1)``.
        visibility: whether the mask may contain only True or 1 (visible) and False or 0 (hidden). Such a mask may also
            have the shape ``(batch or 1, q_len or 1, length)``. The check converts it to a 3-D bool mask.
        queries: names of arguments that may contain the queries. Empty if ``tokens`` are also the queries.
        resized: whether the model adapts length and device of the mask. The check then allows any length and device.
        cache: names of arguments that may contain a cache. With a cache, a grid also has columns for cached tokens, and
            a mask ``(batch, length)`` may have any length.
        subtracted: whether the model subtracts the mask from 1, which fails for bool. The check converts bool to int64.
    """

    tokens: tuple[str, ...]
    public_name: str = ""
    allows_grid: bool = False
    visibility: bool = False
    queries: tuple[str, ...] = ()
    resized: bool = False
    cache: tuple[str, ...] = ()
    subtracted: bool = False


MaskArguments = Mapping[str, MaskArgument]
_INPUTS, _ENCODER_STATES = ("input_ids", "inputs_embeds"), ("encoder_hidden_states",)
ENCODER_MASK = MaskArgument(_INPUTS)
DECODER_MASK = MaskArgument(_INPUTS, allows_grid=True, resized=True, cache=("past_key_values", "cache"))
CROSS_MASK = MaskArgument(_ENCODER_STATES, allows_grid=True, queries=_INPUTS)
CROSS_VISIBILITY = MaskArgument(_ENCODER_STATES, visibility=True, queries=_INPUTS)
# Users pass the mask of a decoder's cross-attention as the ``attention_mask`` of the whole model.
DECODER_MASKS: MaskArguments = {
    "attention_mask": replace(DECODER_MASK, public_name="decoder_attention_mask"),
    "encoder_attention_mask": replace(CROSS_MASK, public_name="attention_mask"),
}


class MaskCheckPoint(CompanionPoint):
    """Patch point of a module whose mask arguments are checked before the forward runs.

    The point needs no fingerprints, because the check uses only the names of the forward's arguments.

    Attributes:
        masks: the mask arguments of the forward, by name.
    """

    masks: MaskArguments
    traceable = True

    def masks_of(self, module: Any) -> MaskArguments:
        """Return the mask arguments of a module. Override this method if modules of the class have different masks."""
        return self.masks

    def describe(self, module: Any) -> str:
        return "checks masks"

    def bind_checked(self, cls: Any, attend: Attend) -> Forward:
        """Return the forward that runs after the check. The default is the original forward."""
        forward: Forward = cls.forward
        return forward

    def bind(self, cls: Any, attend: Attend) -> Forward:
        run = self.bind_checked(cls, attend)
        names = tuple(inspect.signature(cls.forward).parameters)[1:]  # without self

        def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = check_masks(self.masks_of(module), names, args, kwargs)
            return run(module, *args, **kwargs)

        return forward


def check_masks(
    masks: MaskArguments, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Check the masks in the arguments of a forward. Return the arguments, with the masks expanded to the batch size.

    ``names`` are the forward's positional parameters, without ``self``.
    """
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    for argument, mask in masks.items():
        tokens = _first_tokens(given, mask.tokens)
        if given.get(argument) is None or tokens is None:
            continue
        batch, length = tokens.shape[:2]
        cache = next((given[name] for name in mask.cache if given.get(name) is not None), None)
        queries = _first_tokens(given, mask.queries) if mask.queries else tokens
        q_len, name = -1 if queries is None else queries.shape[1], mask.public_name or argument
        if mask.visibility:
            checked = check_visibility(name, given[argument], batch, length, tokens.device, q_len)
        else:
            grid = (q_len, _columns(cache, length)) if mask.allows_grid else None
            any_length, device = mask.resized or cache is not None, None if mask.resized else tokens.device
            checked = check_mask(name, given[argument], batch, None if any_length else length, device, grid)
            refuse_nan(name, checked)
            if mask.subtracted and checked.dtype == torch.bool:
                checked = checked.long()
        if argument in kwargs:
            kwargs = {**kwargs, argument: checked}
        else:
            place = names.index(argument)
            args = (*args[:place], checked, *args[place + 1 :])
    return args, kwargs


def check_mask(
    name: str,
    mask: object,
    batch: int,
    length: int | None,
    device: torch.device | None,
    grid: tuple[int, int] | None = None,
    grid_rank: int = 4,
) -> Tensor:
    """Raise unless the type, shape and device of a mask are valid.

    Args:
        name: the name by which users pass the mask.
        mask: the value of the argument.
        batch: the number of samples. A mask with one row applies to all samples.
        length: the number of tokens. None allows any number.
        device: the device of the tokens. None allows any device except meta.
        grid: ``(q_len, kv_len)`` if the mask may be a grid, else None. A ``q_len`` or ``kv_len`` of -1 allows any size.
        grid_rank: the rank of a grid: 4 if the grid has a dimension of heads, otherwise 3.

    Returns:
        The mask as ``(batch, length)``, or the grid unchanged.

    Raises:
        InvalidArgumentError: the mask is not a tensor, or the rank, shape, dtype or device is wrong.
    """
    if not isinstance(mask, Tensor) or mask.is_complex() or mask.is_nested or mask.layout != torch.strided:
        raise InvalidArgumentError(name, describe(mask), _allowed(batch, length, grid, grid_rank))
    if mask.ndim == 2:
        fits = length in (None, mask.shape[1])
    else:
        sizes = zip(mask.shape[-2:], grid or (), strict=False)
        fits = grid is not None and mask.ndim == grid_rank
        fits = fits and all(size in (1, wanted) or wanted < 0 for size, wanted in sizes)
    if not fits or mask.shape[0] not in (1, batch):
        raise InvalidArgumentError(name, describe(mask), _allowed(batch, length, grid, grid_rank))
    if mask.device != device and (device is not None or mask.is_meta):
        allowed = "any device except meta" if device is None else f"{device}, the device of the tokens"
        raise InvalidArgumentError(f"{name} device", mask.device, allowed)
    # If no expansion is needed, return the mask object itself, because results for a mask are cached by identity.
    return mask.expand(batch, -1) if mask.ndim == 2 and mask.shape[0] != batch else mask


def _allowed(batch: int, length: int | None, grid: tuple[int, int] | None, grid_rank: int) -> str:
    # Only an error reads the sizes as text: torch.compile would compile again for each length in a text.
    allowed = f"a bool, integer or float tensor of shape (1 or {batch}, {'length' if length is None else length})"
    if grid is not None:
        heads = "1 or heads, " if grid_rank == 4 else ""
        q_len, kv_len = (size if size >= 0 else symbol for size, symbol in zip(grid, ("q_len", "kv_len"), strict=True))
        allowed += f" or (1 or {batch}, {heads}{q_len}, {kv_len})"
    return allowed


def check_visibility(
    name: str, mask: object, batch: int, length: int, device: torch.device | None, q_len: int
) -> Tensor:
    """Raise unless a mask contains only True or 1 (visible) and False or 0 (hidden).

    A mask with other values may be additive. In an additive mask, 0 means visible. Arguments and errors are those of
    :func:`check_mask`. ``q_len`` is the number of queries, or -1 if this number is unknown.

    Returns:
        The mask as bool ``(batch, 1 or q_len, length)``.
    """
    checked = check_mask(name, mask, batch, length, device, (q_len, length), grid_rank=3)
    if checked.dtype != torch.bool:
        if not readable(checked):
            allowed = "a bool mask, because vmap hides the values of masks"
            raise InvalidArgumentError(name, f"{describe(checked)}, under vmap", allowed)
        if not bool(((checked == 0) | (checked == 1)).all()):
            raise InvalidArgumentError(name, f"{describe(checked)}, with values other than 0 and 1", "bool, or 0 and 1")
        checked = checked.bool()
    return (checked[:, None] if checked.ndim == 2 else checked).expand(batch, -1, length)


def refuse_nan(name: str, mask: Tensor) -> None:
    """Raise :class:`InvalidArgumentError` if a mask contains NaN. For a float mask on a GPU, the CPU must wait."""
    if mask.is_floating_point() and holds(mask.isnan().any(), unknown=False):
        raise InvalidArgumentError(name, f"{describe(mask)}, with NaN", "a mask without NaN")


def _first_tokens(given: Mapping[str, Any], names: tuple[str, ...]) -> Tensor | None:
    """Return the first of the named arguments that is a tensor ``(batch, length, ...)``, or None."""
    values = (given.get(name) for name in names)
    return next((tokens for tokens in values if isinstance(tokens, Tensor) and tokens.ndim >= 2), None)


def _columns(cache: Any, length: int) -> int:
    """Return the ``kv_len`` of a grid: ``length`` plus the tokens cached in the first layer. -1 means unknown."""
    if cache is None:
        return length
    sizes = getattr(cache, "get_mask_sizes", None)
    return -1 if sizes is None else int(sizes(length, 0)[0])
