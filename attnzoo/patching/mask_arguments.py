"""Checks of the masks that users pass to a model.

The code of a model turns masks into grids. On a list, an array or a wrong rank it fails with an unrelated message, or
it accepts a mask that does not fit. A patched attention sees only the grid. So an adapter describes the mask arguments
of its model (:class:`MaskArgument`), and a :class:`MaskCheckPoint` checks them before the model's forward starts:
before the model builds its grid, and before a cache is filled.
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
    """A mask argument of a module: ``(batch, length)``, and further forms that the module accepts.

    Attributes:
        tokens: names of the arguments that may hold the masked tokens, ``(batch, length, ...)``. The first one given
            counts.
        public_name: the user's name of the mask, if the module's argument has another name.
        allows_grid: whether the mask may also be ``(batch or 1, heads or 1, q_len or 1, kv_len or 1)``.
        visibility: whether the mask must be bool, or 0 and 1, with True for visible tokens. It may then also be
            ``(batch or 1, q_len or 1, length)``. The module gets a bool mask of that rank.
        queries: names of the arguments that may hold the queries, if these are other tokens.
        resized: whether the model itself cuts or extends a mask of another length and moves it to its device.
        cache: names of the arguments that may hold a cache. With a cache, a grid has one column per cached token, and
            other masks may have any length.
    """

    tokens: tuple[str, ...]
    public_name: str = ""
    allows_grid: bool = False
    visibility: bool = False
    queries: tuple[str, ...] = ()
    resized: bool = False
    cache: tuple[str, ...] = ()


MaskArguments = Mapping[str, MaskArgument]
_INPUTS, _ENCODER_STATES = ("input_ids", "inputs_embeds"), ("encoder_hidden_states",)
ENCODER_MASK = MaskArgument(_INPUTS)
DECODER_MASK = MaskArgument(_INPUTS, allows_grid=True, resized=True, cache=("past_key_values", "cache"))
CROSS_MASK = MaskArgument(_ENCODER_STATES, allows_grid=True, queries=_INPUTS)
CROSS_VISIBILITY = MaskArgument(_ENCODER_STATES, visibility=True, queries=_INPUTS)
# Users know the mask of a decoder's cross-attention as the model's ``attention_mask``.
DECODER_MASKS: MaskArguments = {
    "attention_mask": replace(DECODER_MASK, public_name="decoder_attention_mask"),
    "encoder_attention_mask": replace(CROSS_MASK, public_name="attention_mask"),
}


class MaskCheckPoint(CompanionPoint):
    """A module whose mask arguments are checked before its forward runs.

    The check needs only the names of the forward's arguments, so the point needs no fingerprints.

    Attributes:
        masks: the mask arguments of the forward, by name.
    """

    masks: MaskArguments

    def masks_of(self, module: Any) -> MaskArguments:
        """Return :attr:`masks`. Override it if they differ between modules of the class."""
        return self.masks

    def describe(self, module: Any) -> str:
        return "checks masks"

    def bind_checked(self, cls: Any, attend: Attend) -> Forward:
        """Return the forward that runs after the check: the original, unless a subclass overrides this method."""
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
    """Return the arguments of a forward with its masks checked, and masks of one row expanded to all samples.

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
    """Check the type, shape and device of a mask.

    Args:
        name: the user's name of the argument.
        mask: the value of the argument.
        batch: the number of samples. A mask of one row applies to all of them.
        length: the number of tokens. None allows any number.
        device: the device of the tokens. None allows any device that holds data.
        grid: ``(q_len, kv_len)`` if the mask may be a grid. A length of -1 allows any number.
        grid_rank: the rank of a grid; 4 with a dimension of heads, 3 without.

    Returns:
        The mask as ``(batch, length)``, or the grid unchanged.

    Raises:
        InvalidArgumentError: the mask is not a tensor, or has a wrong rank, shape, dtype or device.
    """
    allowed = f"a tensor ({batch}, {'length' if length is None else length}) of bool, integers or floats"
    if grid is not None:
        heads = "heads or 1, " if grid_rank == 4 else ""
        q_len, kv_len = (size if size >= 0 else symbol for size, symbol in zip(grid, ("q_len", "kv_len"), strict=True))
        allowed += f", or a grid (1 or {batch}, {heads}{q_len}, {kv_len})"
    if not isinstance(mask, Tensor) or mask.is_complex() or mask.is_nested or mask.layout != torch.strided:
        raise InvalidArgumentError(name, describe(mask), allowed)
    if mask.ndim == 2:
        fits = length in (None, mask.shape[1])
    else:
        sizes = zip(mask.shape[-2:], grid or (), strict=False)
        fits = grid is not None and mask.ndim == grid_rank
        fits = fits and all(size in (1, wanted) or wanted < 0 for size, wanted in sizes)
    if not fits or mask.shape[0] not in (1, batch):
        raise InvalidArgumentError(name, describe(mask), allowed)
    if mask.device != device and (device is not None or mask.is_meta):
        allowed = "a device that holds data" if device is None else f"{device}, as its tokens"
        raise InvalidArgumentError(f"{name} device", mask.device, allowed)
    # A mask that needs no expansion stays the same object: results derived from it are cached by identity.
    return mask.expand(batch, -1) if mask.ndim == 2 and mask.shape[0] != batch else mask


def check_visibility(
    name: str, mask: object, batch: int, length: int, device: torch.device | None, q_len: int
) -> Tensor:
    """Check a mask that must be bool, or 0 and 1, with True for visible tokens.

    An additive mask means the opposite, so other values raise, NaN included. The arguments and errors are those of
    :func:`check_mask`; ``q_len`` is the number of queries, or -1 if it is unknown.

    Returns:
        Bool ``(batch, 1 or q_len, length)``.
    """
    checked = check_mask(name, mask, batch, length, device, (q_len, length), grid_rank=3)
    if checked.dtype != torch.bool:
        if not readable(checked):
            got = f"{describe(checked)} under vmap, where its values cannot be checked"
            raise InvalidArgumentError(name, got, "bool")
        if not bool(((checked == 0) | (checked == 1)).all()):
            raise InvalidArgumentError(name, f"{describe(checked)} with values other than 0 and 1", "bool, or 0 and 1")
        checked = checked.bool()
    return (checked[:, None] if checked.ndim == 2 else checked).expand(batch, -1, length)


def refuse_nan(name: str, mask: Tensor) -> None:
    """Raise :class:`InvalidArgumentError` if a mask contains NaN. If it has floats, this waits for its device."""
    if mask.is_floating_point() and holds(mask.isnan().any(), unknown=False):
        raise InvalidArgumentError(name, f"{describe(mask)} with NaN in it", "no NaN")


def _first_tokens(given: Mapping[str, Any], names: tuple[str, ...]) -> Tensor | None:
    """Return the first argument that is a tensor ``(batch, length, ...)``; without one, the model itself will raise."""
    values = (given.get(name) for name in names)
    return next((tokens for tokens in values if isinstance(tokens, Tensor) and tokens.ndim >= 2), None)


def _columns(cache: Any, length: int) -> int:
    """Return the number of keys of the first layer; -1 if the cache does not tell (pages of many requests)."""
    if cache is None:
        return length
    sizes = getattr(cache, "get_mask_sizes", None)
    return -1 if sizes is None else int(sizes(length, 0)[0])
