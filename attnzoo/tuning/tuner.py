"""``tune``: measure, on a model's own attentions, which backend is fastest, and keep it for ``auto``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnzoo.auto import cache
from attnzoo.auto.choice import is_current
from attnzoo.auto.environment import Environment, environment_of
from attnzoo.auto.measurements import Measurement, SizeClass, key_of, size_class, to_plain_data
from attnzoo.backend import Backend
from attnzoo.errors import InvalidArgumentError
from attnzoo.patching.patch import patch
from attnzoo.patching.replay import own_random_stream
from attnzoo.patching.sites import Site
from attnzoo.registry import registry
from attnzoo.spec.segments import Attention, Request, Result
from attnzoo.tuning.race import ROUNDS, Clock, race
from attnzoo.tuning.report import Tuning


class Met(NamedTuple):
    """An attention that a model was seen to compute, one per request, size class and environment."""

    request: Request
    size: SizeClass
    environment: Environment
    attention: Attention
    where: str


def tune(
    model: nn.Module,
    inputs: Mapping[str, Any] | Callable[[], object],
    *,
    gradients: bool | None = None,
    again: bool = False,
    save: bool = True,
    rounds: int = ROUNDS,
    clock: Clock | None = None,
    progress: Callable[[str], None] | None = None,
) -> Tuning:
    """Measure which backend is fastest at each attention of a model, for ``auto`` to take from now on.

    Runs the model once, as it is (train or eval, dtype, device, autocast), to see which attentions it computes. Each
    request that it makes, in each size class (batch and lengths rounded up to powers of two), is then timed on every
    backend that refuses nothing: medians of interleaved rounds, warm-up and compilation left out, on the attention the
    model really computed. A backend that is not within the error rule there, or raises, is reported and never taken;
    backends that change a dense model's pattern are not considered. What is known already is not measured again.

    Measuring happens here and nowhere else: a forward never measures. Weights, gradients, configuration and the random
    streams are left as they were.

    Args:
        model: a model of a family with an adapter; may be patched.
        inputs: keyword arguments of its forward; or a function that runs it in whatever way is to be fast, e.g.
            ``lambda: model.generate(**prompt)``.
        gradients: tune for training (forward and backward) or for inference; None: as the model's mode says.
        again: measure what is known already, too.
        save: keep the results in the cache file (``$ATTNZOO_CACHE_DIR``, else ``~/.cache/attnzoo``); else they hold
            for this process.
        rounds: timed samples per backend, at least 1.
        clock: tells seconds; None: ``time.perf_counter``.
        progress: is told what is being measured.

    Returns:
        A :class:`Tuning`: a tuple of :class:`Measurement`, which prints as a table.

    Raises:
        InvalidArgumentError: a bad argument.
        CacheError: the results could not be kept (found out before anything is measured).
        Whatever :func:`attnzoo.patch` or the model raises.
    """
    if not isinstance(model, nn.Module):
        raise InvalidArgumentError("model", type(model).__name__, "a torch.nn.Module")
    if isinstance(inputs, nn.Module) or not (isinstance(inputs, Mapping) or callable(inputs)):
        allowed = "a mapping of keyword arguments of model.forward, or a function without arguments that runs the model"
        raise InvalidArgumentError("inputs", type(inputs).__name__, allowed)
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise InvalidArgumentError("rounds", repr(rounds), "an integer >= 1")
    trains = model.training if gradients is None else gradients
    if trains and torch.is_inference_mode_enabled():
        raise InvalidArgumentError("gradients", "True inside torch.inference_mode()", "False, or outside of it")
    if save:
        cache.check_writable()
    found: list[Measurement] = []
    fresh: set[str] = set()
    with own_random_stream(model):
        meetings = _meet(model, inputs, trains)
        for number, met in enumerate(meetings, 1):
            takes = registry.supporting_backends(met.request)
            old = cache.find(met.environment, key_of(met.request, met.size))
            if old is not None and not again and all(is_current(old, backend) for backend in takes):
                found.append(old)
                continue
            if progress is not None:
                progress(f"{number}/{len(meetings)} {met.where}: {met.size}")
            outcomes = race(met.attention, takes, grad=met.request.grad, rounds=rounds, clock=clock)
            new = Measurement(to_plain_data(met.request), met.size, outcomes, met.where)
            # Kept at once: what was measured before an interruption need not be measured again.
            cache.add(met.environment, [new], save=save)
            found.append(new)
            fresh.add(new.key)
    return Tuning(found, frozenset(fresh))


def clear() -> list[Path]:
    """Forget all that was measured, in this process and in every cache file; returns the files removed.

    Raises:
        CacheError: a file cannot be removed.
    """
    return cache.clear()


def _meet(model: nn.Module, inputs: Mapping[str, Any] | Callable[[], object], gradients: bool) -> list[Met]:
    """Run the model once and see which attentions it computes for which there is a choice."""
    met: dict[tuple[str, Environment], Met] = {}

    def observe(site: Site, attention: Attention, result: Result, ran: Backend) -> None:
        request, size = attention.request(result.probabilities is not None), size_class(attention)
        environment = environment_of(attention.query.device)
        key = (key_of(request, size), environment)
        if key not in met and len(registry.supporting_backends(request)) > 1:
            met[key] = Met(request, size, environment, _without_history(attention), f"{site.cls}, {site.pattern}")

    with _left_as_is(model), patch(model, "auto") as handle, torch.set_grad_enabled(gradients):
        for site in handle.sites:
            site.observer = observe
        if isinstance(inputs, Mapping):
            returned = model(**inputs)
            if gradients:  # layers that are checkpointed or reversible ask for gradients only in their backward
                _backward(returned)
        else:
            inputs()
    return list(met.values())


def _backward(returned: Any) -> None:
    """Backward from everything a model returns at the top level."""
    if isinstance(returned, Mapping):
        returned = tuple(returned.values())
    values = returned if isinstance(returned, (tuple, list)) else (returned,)
    outputs = [value for value in values if isinstance(value, Tensor) and value.requires_grad]
    if outputs:
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])


def _without_history(attention: Attention) -> Attention:
    """The same attention on leaves that require grad where its tensors do; what was one tensor stays one."""
    leaves: dict[int, Tensor] = {}
    for tensor in attention.tensors():
        leaves.setdefault(id(tensor), tensor.detach().requires_grad_(tensor.requires_grad))
    return attention.with_tensors(tuple(leaves[id(tensor)] for tensor in attention.tensors()))


@contextmanager
def _left_as_is(model: nn.Module) -> Iterator[None]:
    """Put back the gradients of parameters, and what a forward in training mode counts in buffers (running means)."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()] if model.training else []
    for parameter, _ in gradients:
        parameter.grad = None  # a backward would add to the tensor itself
    try:
        yield
    finally:
        for parameter, grad in gradients:
            parameter.grad = grad
        with torch.no_grad():
            for buffer, kept in buffers:
                if not torch.equal(buffer, kept):
                    buffer.copy_(kept)
