"""Record calls of modules, and repeat them with fresh copies of everything that a call may change."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

CallId = tuple[str, int]


class RecordedCall(NamedTuple):
    """The arguments of one call of a module, as copies without autograd history."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def fresh(self) -> RecordedCall:
        """Return a copy. A call may change its arguments, for example fill a cache or write into a mask."""
        return RecordedCall(copied(self.args), copied(self.kwargs))

    def nbytes(self) -> int:
        """Return the size of all tensors in the arguments, caches included, in bytes."""
        seen: set[int] = set()
        tensors = (tensor for value in (*self.args, *self.kwargs.values()) for tensor in _tensors_in(value, seen))
        return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())

    def leaves(self) -> list[Tensor]:
        """Return the tensors that get a gradient in training: hidden states (3-D), and tensors that require grad."""
        tensors = (value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor))
        floats = (tensor for tensor in tensors if tensor.is_floating_point())
        return [tensor for tensor in floats if tensor.requires_grad or tensor.ndim == 3]


def copied(value: Any) -> Any:
    """Return a copy of an argument in which every tensor is a leaf that requires grad if the original does."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(copied(item) for item in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    # ``deepcopy`` refuses tensors with autograd history. In training, caches contain such tensors. So copy them first.
    memo: dict[int, Any] = {id(tensor): copied(tensor) for tensor in _tensors_in(value, set())}
    return copy.deepcopy(value, memo)


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Yield the tensors inside an object: in its items and attributes, at any depth."""
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in seen or isinstance(value, (nn.Module, type)):
        return
    seen.add(id(value))
    items = (
        list(value.values()) if isinstance(value, Mapping) else list(value) if isinstance(value, (list, tuple)) else []
    )
    for item in (*items, *getattr(value, "__dict__", {}).values()):
        yield from _tensors_in(item, seen)


Wanted = Callable[[CallId, Any, tuple[Any, ...], dict[str, Any]], bool]


@contextmanager
def recording_calls(modules: Mapping[str, nn.Module], wanted: Wanted) -> Iterator[dict[CallId, RecordedCall]]:
    """Context manager that records the calls of named modules for which ``wanted(id, module, args, kwargs)`` is True.

    The id of a call is the name of the module, and the number of earlier calls of this module.
    """
    calls: dict[CallId, RecordedCall] = {}
    counts = dict.fromkeys(modules, 0)

    def record(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        identity = (name, counts[name])
        counts[name] += 1
        if wanted(identity, module, args, kwargs):
            calls[identity] = RecordedCall(args, kwargs).fresh()

    with ExitStack() as hooks:
        for name, module in modules.items():
            hook = module.register_forward_pre_hook(partial(record, name), with_kwargs=True)
            hooks.callback(hook.remove)
        yield calls
