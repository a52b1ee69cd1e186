"""Making runs of a model repeat one run's random choices, whatever their dtype.

LSH attention hashes by random rotations, drawn in the dtype of the model: the same seed gives others in float64. Runs
are comparable only if all of them hash alike. ``PatchPoint.replay`` turns the output of a module into keyword arguments
that make it repeat its choices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

Made = dict[str, list[dict[str, Any]]]


@contextmanager
def recording(modules: Mapping[str, tuple[nn.Module, Callable[[Any], dict[str, Any]]]]) -> Iterator[Made]:
    """Record what each call of the modules chose.

    Args:
        modules: by name, each with its point's ``replay``.

    Yields:
        By name, in the order of the calls, the keyword arguments that make a call choose the same.
    """
    made: Made = defaultdict(list)

    def hook(name: str, replay: Callable[[Any], dict[str, Any]]) -> Callable[..., None]:
        return lambda module, args, output: made[name].append(replay(output))

    handles = [module.register_forward_hook(hook(name, replay)) for name, (module, replay) in modules.items()]
    try:
        yield made
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaying(model: nn.Module, made: Made) -> Iterator[None]:
    """Have the modules of these names choose, call by call, what was recorded."""

    def hook(turns: Iterator[dict[str, Any]]) -> Callable[..., Any]:
        return lambda module, args, kwargs: (args, {**kwargs, **next(turns)})

    handles = [
        model.get_submodule(name).register_forward_pre_hook(hook(iter(calls)), with_kwargs=True)
        for name, calls in made.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def own_random_stream(model: nn.Module) -> AbstractContextManager[None]:
    """Leave the random streams of the CPU and of the model's CUDA devices as they are, whatever is drawn within."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    return torch.random.fork_rng(devices=devices)
