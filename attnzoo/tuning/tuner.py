"""``tune``: measure which backend is fastest for each attention of a model, and store the result for ``auto``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnzoo.auto import cache
from attnzoo.auto.choice import is_current
from attnzoo.auto.environment import Environment, environment_of
from attnzoo.auto.measurements import Measurement, SizeClass, key_of, size_class, to_plain_data
from attnzoo.auto.modules import PATCHED
from attnzoo.auto.modules import is_current as is_current_module
from attnzoo.backend import Backend
from attnzoo.errors import InvalidArgumentError
from attnzoo.patching.patch import patch
from attnzoo.patching.replay import own_random_stream
from attnzoo.patching.sites import Site, check_model
from attnzoo.registry import registry
from attnzoo.spec.segments import Attention, Request, Result
from attnzoo.tuning.module_race import CONTENDERS, ModuleCalls, race_modules
from attnzoo.tuning.race import ROUNDS, Clock, is_out_of_memory, race
from attnzoo.tuning.report import TuningReport
from attnzoo.verification.model_runs import check_gradient_mode


class ObservedAttention(NamedTuple):
    """One attention of a model. It represents all attentions with the same request, size class and environment."""

    request: Request
    size: SizeClass
    environment: Environment
    attention: Attention
    site: str


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
) -> TuningReport:
    """Measure which backend is fastest for each attention of a model. ``auto`` selects backends by these measurements.

    ``tune`` runs the model in the current mode, dtype and autocast, and records the attentions. It then times every
    backend that supports a recorded attention, once per request and size class (batch and lengths rounded up to powers
    of two). Then ``tune`` runs the model's code, and times each kind of module twice: with the model's code
    (``native``), and with the fastest backends. A time is the median of several rounds, without warm-up and
    compilation. ``auto`` never selects a backend that failed the error rule or raised. ``tune`` reuses stored
    measurements, and does not time backends that change the pattern. The model, its gradients and the states of random
    number generators do not change.

    Args:
        model: a model of a family with an adapter. The model may be patched.
        inputs: keyword arguments of the model's forward, or a function that runs the model. To tune for decoding, pass
            ``lambda: model.generate(**prompt)``. The function is called once or twice.
        gradients: True tunes for training (forward and backward), and False tunes for inference. None selects training
            if the model is in training mode.
        again: whether attentions that already have a stored measurement are measured again.
        save: whether the results are written to the cache file (in ``$ATTNZOO_CACHE_DIR``, or in ``~/.cache/attnzoo``
            if that variable is not set). Without the file, the results are valid in this process only.
        rounds: number of timed samples per backend, at least 1.
        clock: function that returns seconds. None means ``time.perf_counter``.
        progress: function that is called with a description of each attention before its measurement.

    Returns:
        A tuple of measurements of attentions, whose attribute ``modules`` has the measurements of modules. ``print``
        shows both as tables.

    Raises:
        InvalidArgumentError: an argument is invalid.
        CacheError: the cache file cannot be written. The check comes before the first measurement.
        Exception: any exception that :func:`attnzoo.patch` or the model raises.

    Example:
        >>> import torch, transformers, attnzoo
        >>> config = transformers.GPTNeoXConfig(
        ...     vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        ... )
        >>> model = transformers.GPTNeoXForCausalLM(config).eval()
        >>> (measurement,) = attnzoo.tune(model, {"input_ids": torch.arange(12)[None]}, save=False)
        >>> measurement.mode
        'forward'
    """
    check_model(model)
    if isinstance(inputs, nn.Module) or not (isinstance(inputs, Mapping) or callable(inputs)):
        allowed = "a mapping of keyword arguments of model.forward, or a function without arguments that runs the model"
        raise InvalidArgumentError("inputs", type(inputs).__name__, allowed)
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise InvalidArgumentError("rounds", repr(rounds), "an integer >= 1")
    gradients = model.training if gradients is None else gradients
    check_gradient_mode(gradients)
    if save:
        cache.check_writable()
    tick = time.perf_counter if clock is None else clock
    measurements: list[Measurement] = []
    modules: list[Measurement] = []
    fresh: set[str] = set()
    with own_random_stream(model):
        calls = ModuleCalls(model)
        with calls.finding():
            observed = _observe_model(model, inputs, gradients)
        for number, (request, size, environment, attention, site) in enumerate(observed, 1):
            backends = registry.supporting_backends(request)
            known = cache.find(environment, key_of(request, size))
            if known is not None and not again and all(is_current(known, backend) for backend in backends):
                measurements.append(known)
                continue
            if progress is not None:
                progress(f"{number}/{len(observed)} {site}: {size}")
            outcomes = race(attention, backends, grad=request.grad, rounds=rounds, clock=clock)
            measurement = Measurement(to_plain_data(request), size, outcomes, site)
            cache.add(environment, [measurement], save=save)  # at once, so that an interruption loses nothing
            measurements.append(measurement)
            fresh.add(measurement.key)
        # Modules come after attentions, because a patched module runs the backends that were measured as fastest.
        groups = []
        for group in calls.groups:
            known = cache.find(group.environment, group.key)
            if known is not None and not again and is_current_module(known, group.target.cls):
                modules.append(known)
            else:
                groups.append(group)
        if groups:
            with calls.repeating():
                _run_native(model, inputs, gradients, calls.backends())
        for number, group in enumerate(groups, 1):
            if progress is not None:
                progress(f"module {number}/{len(groups)} {group.where}: {group.call.size}")
            measured = race_modules(model, calls, group, rounds, tick)
            if measured is not None:
                cache.add(group.environment, [measured], save=save)
                modules.append(measured)
                fresh.add(measured.key)
    return TuningReport(measurements, frozenset(fresh), tuple(modules))


def _observe_model(
    model: nn.Module, inputs: Mapping[str, Any] | Callable[[], object], gradients: bool
) -> list[ObservedAttention]:
    """Run the model once, and return the attentions that more than one backend supports."""
    observed: dict[tuple[str, Environment], ObservedAttention] = {}

    def observe(site: Site, attention: Attention, result: Result, ran: Backend) -> None:
        request, size = attention.request(result.probabilities is not None), size_class(attention)
        environment = environment_of(attention.query.device)
        key = (key_of(request, size), environment)
        if key not in observed and len(registry.supporting_backends(request)) > 1:
            leaves = _without_history(attention)
            observed[key] = ObservedAttention(request, size, environment, leaves, f"{site.cls}, {site.pattern}")

    with _restored(model), patch(model, CONTENDERS[PATCHED]) as handle:
        for site in handle.sites:
            site.observer = observe
        _run_model(model, inputs, gradients)
    return list(observed.values())


def _run_native(
    model: nn.Module,
    inputs: Mapping[str, Any] | Callable[[], object],
    gradients: bool,
    backends: Mapping[str, Backend],
) -> None:
    """Run the model's code once. Full memory is no error here, because users may patch a model to save memory."""
    try:
        with _restored(model), patch(model, backends):
            _run_model(model, inputs, gradients)
    except Exception as error:
        if not is_out_of_memory(error):
            raise


def _run_model(model: nn.Module, inputs: Mapping[str, Any] | Callable[[], object], gradients: bool) -> None:
    with torch.set_grad_enabled(gradients):
        if isinstance(inputs, Mapping):
            returned = model(**inputs)
            if gradients:  # checkpointed and reversible layers run with gradients only in their backward
                _backward(returned)
        else:
            inputs()


def _backward(returned: Any) -> None:
    """Run the backward of the tensors that the model returned, except tensors in nested containers."""
    if isinstance(returned, Mapping):
        returned = tuple(returned.values())
    values = returned if isinstance(returned, (tuple, list)) else (returned,)
    outputs = [value for value in values if isinstance(value, Tensor) and value.requires_grad]
    if outputs:
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])


def _without_history(attention: Attention) -> Attention:
    """Return a copy of the attention with detached tensors. Fields with the same tensor also get the same copy."""
    leaves: dict[int, Tensor] = {}
    for tensor in attention.tensors():
        leaves.setdefault(id(tensor), tensor.detach().requires_grad_(tensor.requires_grad))
    return attention.with_tensors(tuple(leaves[id(tensor)] for tensor in attention.tensors()))


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Context manager that, on exit, restores the gradients of parameters and the buffers that training changes."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()] if model.training else []
    for parameter, _ in gradients:
        parameter.grad = None  # a backward would add to the existing tensor in place
    try:
        yield
    finally:
        for parameter, grad in gradients:
            parameter.grad = grad
        with torch.no_grad():
            for buffer, kept in buffers:
                if not torch.equal(buffer, kept):
                    buffer.copy_(kept)
