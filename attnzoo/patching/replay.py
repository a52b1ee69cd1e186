"""Repeat the random choices of one run of a model in other runs, whatever their dtype.

LSH attention hashes by random rotations that are drawn in the model's dtype, so the same seed gives other hashes in
float64. Runs are comparable only if all of them hash alike. ``PatchPoint.replay`` turns a module's output into the
keyword arguments that make the module repeat its choices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

Choices = dict[str, list[dict[str, Any]]]


@contextmanager
def recording(modules: Mapping[str, tuple[nn.Module, Callable[[Any], dict[str, Any]]]]) -> Iterator[Choices]:
    """Record the random choices of each call of the modules, given by name with the ``replay`` of their patch points.

    Yields by name, in the order of the calls, the keyword arguments that make a call repeat its choices.
    """
    choices: Choices = defaultdict(list)

    def hook(name: str, replay: Callable[[Any], dict[str, Any]]) -> Callable[..., None]:
        return lambda module, args, output: choices[name].append(replay(output))

    with ExitStack() as handles:
        for name, (module, replay) in modules.items():
            handles.enter_context(module.register_forward_hook(hook(name, replay)))
        yield choices


@contextmanager
def replaying(model: nn.Module, choices: Choices) -> Iterator[None]:
    """Make the modules of these names repeat the recorded choices, call by call."""

    def hook(recorded: Iterator[dict[str, Any]]) -> Callable[..., Any]:
        return lambda module, args, kwargs: (args, {**kwargs, **next(recorded)})

    with ExitStack() as handles:
        for name, calls in choices.items():
            module = model.get_submodule(name)
            handles.enter_context(module.register_forward_pre_hook(hook(iter(calls)), with_kwargs=True))
        yield


def own_random_stream(model: nn.Module) -> AbstractContextManager[None]:
    """Restore the random streams of the CPU and of the model's CUDA devices on leaving the ``with`` block."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    return torch.random.fork_rng(devices=devices)
