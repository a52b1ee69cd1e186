"""Repeat the random choices of one run of a model in later runs, also in runs of a different dtype.

LSH attention hashes with random rotations in the model's dtype. So the hashes in float64 differ from the hashes in
float32, even with the same seed. Runs are comparable only if their hashes are equal. ``PatchPoint.replay`` turns the
output of a module into keyword arguments. With these arguments, the module repeats its choices.
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
    """Yield a dictionary that receives the random choices of ``modules`` while the ``with`` block runs.

    ``modules`` maps each module name to a pair: the module, and the ``replay`` method of its patch point. The yielded
    dictionary maps each module name to a list with one item per call. An item contains the keyword arguments with which
    the module repeats the choices of this call.
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
    """Context manager in which call ``n`` of a module repeats the choices of the module's recorded call ``n``."""

    def hook(recorded: Iterator[dict[str, Any]]) -> Callable[..., Any]:
        return lambda module, args, kwargs: (args, {**kwargs, **next(recorded)})

    with ExitStack() as handles:
        for name, calls in choices.items():
            module = model.get_submodule(name)
            handles.enter_context(module.register_forward_pre_hook(hook(iter(calls)), with_kwargs=True))
        yield


def own_random_stream(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context manager that restores, on exit, the random state of the CPU and of the model's CUDA devices."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    return torch.random.fork_rng(devices=devices)
