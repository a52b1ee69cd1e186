"""Masks as users type them, checked where a model takes them: before it builds its own, and before a cache is filled.

The code of a model turns masks into grids. On a list, an array or a wrong rank it fails with an unrelated message, or
it takes a mask that does not fit. A patched attention sees only the grid. So an adapter names the masks its models
take (:class:`TypedMask`), and a companion of the model (``companions``) checks them in front of its forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.adapter import Attend, Forward
from attnzoo.errors import InvalidArgumentError
from attnzoo.spec.segments import describe
from attnzoo.spec.transforms import holds


@dataclass(frozen=True)
class TypedMask:
    """One mask that a model takes.

    Attributes:
        of: the arguments that may hold its tokens, ``(batch, length, ...)``; the first that is given counts.
        name: the user's name of the mask, if the module's argument has another name.
        grids: whether it may be a grid ``(batch or 1, heads or 1, q_len or 1, kv_len or 1)`` too.
        queries: the arguments that may hold the queries of a grid, where those are other tokens.
        cut: whether the model cuts and fills a mask of another length itself, and moves it to its device.
        cache: the arguments that may hold a cache. With one, a grid has its columns, and other masks any length.
    """

    of: tuple[str, ...]
    name: str = ""
    grids: bool = False
    queries: tuple[str, ...] = ()
    cut: bool = False
    cache: tuple[str, ...] = ()


TypedMasks = Mapping[str, TypedMask]
Bind = Callable[[type, Attend], Forward]
_INPUTS = ("input_ids", "inputs_embeds")
ENCODER_MASK = TypedMask(of=_INPUTS)
DECODER_MASK = TypedMask(of=_INPUTS, grids=True, cut=True, cache=("past_key_values", "cache"))
CROSS_MASK = TypedMask(of=("encoder_hidden_states",), grids=True, queries=_INPUTS)


def check_mask(
    name: str,
    mask: object,
    batch: int,
    length: int | None,
    device: torch.device | None,
    grid: tuple[int, int] | None = None,
) -> Tensor:
    """Check a mask of tokens or, where that is allowed, a grid of queries and keys.

    Args:
        name: the argument, as the user typed it.
        mask: what was given.
        batch: of the tokens; a mask of one row is for all of them.
        length: of the tokens; None: any.
        device: of the tokens; None: any that holds data.
        grid: ``(q_len, kv_len)`` if the mask may be a grid; -1 for any length.

    Returns:
        The mask: ``(batch, length)``, one row repeated; or the grid as it is.

    Raises:
        InvalidArgumentError: no tensor, or one of wrong rank, shape, dtype or device.
    """
    shown = "length" if length is None else length
    allowed = f"a tensor ({batch}, {shown}) of bool, integers or floats"
    if grid is not None:
        allowed += f", or a grid (1 or {batch}, heads or 1, {grid[0]}, {'kv_len' if grid[1] < 0 else grid[1]})"
    if not isinstance(mask, Tensor) or mask.is_complex() or mask.is_nested or mask.layout != torch.strided:
        raise InvalidArgumentError(name, describe(mask), allowed)
    if mask.ndim == 2:
        fits = mask.shape[0] in (1, batch) and length in (None, mask.shape[1])
    else:
        sizes = () if grid is None else zip(mask.shape[2:], grid, strict=False)
        fits = grid is not None and mask.ndim == 4 and mask.shape[0] in (1, batch)
        fits = fits and all(size in (1, wanted) or wanted < 0 for size, wanted in sizes)
    if not fits:
        raise InvalidArgumentError(name, describe(mask), allowed)
    if mask.device != device and (device is not None or mask.is_meta):
        allowed = "a device that holds data" if device is None else f"{device}, as its tokens"
        raise InvalidArgumentError(f"{name} device", mask.device, allowed)
    repeated = mask.ndim == 2 and mask.shape[0] != batch
    return mask.expand(batch, -1) if repeated else mask  # the same object: what is derived of it is kept by identity


def refuse_nan(name: str, mask: Tensor) -> None:
    """Raise if there is NaN in a mask. Waits for the device where the mask is of floats.

    Raises:
        InvalidArgumentError: names the mask.
    """
    if mask.is_floating_point() and holds(mask.isnan().any(), unknown=False):
        raise InvalidArgumentError(name, f"{describe(mask)} with NaN in it", "no NaN")


def checking(masks: Callable[[Any], TypedMasks], bind: Bind | None = None) -> Bind:
    """The ``bind`` of a point that checks masks in front of another forward. It needs only the names of the
    forward's arguments, so it has no fingerprints.

    Args:
        masks: by argument, what a module takes.
        bind: of the forward that runs then; None: that of the class.
    """

    def bind_checking(cls: Any, attend: Attend) -> Forward:
        run = cls.forward if bind is None else bind(cls, attend)
        names = tuple(inspect.signature(cls.forward).parameters)[1:]  # without self

        def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = check_masks(masks(module), names, args, kwargs)
            return run(module, *args, **kwargs)

        return forward

    return bind_checking


def check_masks(
    masks: TypedMasks, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a forward with its masks checked, and masks of one row repeated for all samples."""
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    for argument, typed in masks.items():
        tokens = _tokens(given, typed.of)
        if given.get(argument) is None or tokens is None:
            continue
        batch, length = tokens.shape[:2]
        cache = next((given[name] for name in typed.cache if given.get(name) is not None), None)
        grid = None
        if typed.grids:
            queries = _tokens(given, typed.queries) if typed.queries else tokens
            grid = (-1 if queries is None else queries.shape[1], _columns(cache, length))
        name, device = typed.name or argument, None if typed.cut else tokens.device
        any_length = typed.cut or cache is not None
        checked = check_mask(name, given[argument], batch, None if any_length else length, device, grid)
        refuse_nan(name, checked)
        if argument in kwargs:
            kwargs = {**kwargs, argument: checked}
        else:
            place = names.index(argument)
            args = (*args[:place], checked, *args[place + 1 :])
    return args, kwargs


def _tokens(given: Mapping[str, Any], names: tuple[str, ...]) -> Tensor | None:
    """The tensor ``(batch, length, ...)`` that is given by one of the names; None: the model will fail without it."""
    found = (given.get(name) for name in names)
    return next((tokens for tokens in found if isinstance(tokens, Tensor) and tokens.ndim >= 2), None)


def _columns(cache: Any, length: int) -> int:
    """How many keys the first layer's attention will have; -1 where that is not known (pages of many requests)."""
    if cache is None:
        return length
    sizes = getattr(cache, "get_mask_sizes", None)
    return -1 if sizes is None else int(sizes(length, 0)[0])
