"""Time whole attention modules: the model's code against the fastest backends.

The model's code builds no :class:`Attention`. So both are compared on the calls of whole modules. ``tune`` runs the
model twice, with the model's code and with backends, and records the arguments of the modules in both runs. Then
``tune`` repeats the recorded calls of one module of each kind. Two runs are necessary because layers may share a value
that the first layer computes (such as a position bias), and its format differs between the model's code and backends.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.auto.calls import TRAINING, ModuleCall, describe_call, hidden_states
from attnzoo.auto.environment import Environment, code_of, environment_of
from attnzoo.auto.measurements import Measurement, Outcome, key_of
from attnzoo.auto.modules import NATIVE, PATCHED, codes_of, request_of
from attnzoo.auto.rule import count_scores, kind_of
from attnzoo.auto.selection import AutoBackend
from attnzoo.backend import Backend
from attnzoo.conformance.attention_check import check_attention
from attnzoo.patching.patch import patch
from attnzoo.patching.sites import PatchTarget, Site, find_sites
from attnzoo.spec.segments import Attention, Request, Result
from attnzoo.tuning.race import (
    DENSE_BYTES,
    GRIDS,
    GRIDS_KEPT,
    ROWS,
    Clock,
    Preparation,
    is_out_of_memory,
    raised,
    synchronize,
    time_in_turns,
)
from attnzoo.tuning.recorded_calls import CallId, RecordedCall, recording_calls

# The two contenders. Both run in a patched module, so both times contain the time that ``auto`` needs to decide.
CONTENDERS = {NATIVE: AutoBackend(native="always"), PATCHED: AutoBackend(native="never")}


@dataclass
class Group:
    """The calls of modules of one kind and one size. They are measured together.

    Attributes:
        target: the first of these modules.
        request: the request of the measurement (:func:`attnzoo.auto.modules.request_of`).
        call: the properties of the call of the first module.
        device: the device of the hidden states.
        first, last: the call of the first module, and the call of the last module. Modules that share no values need
            equal times, so for them both fields have the call of the first module.
        names: the names of the modules.
    """

    target: PatchTarget
    request: dict[str, Any]
    call: ModuleCall
    device: torch.device
    first: CallId
    last: CallId
    names: set[str] = field(default_factory=set)

    @property
    def environment(self) -> Environment:
        return environment_of(self.device)

    @property
    def where(self) -> str:
        """The class and the pattern of the modules, as text for users."""
        return f"{self.target.cls.__name__}, {self.request['pattern']}, whole module"

    @property
    def key(self) -> str:
        return key_of(self.request, self.call.size)

    def runs(self) -> list[CallId]:
        """Return the calls that one run repeats: the first, or one per module if the modules share values."""
        return [self.first] + [self.last] * (len(self.names) - 1 if self.target.point.shared_in else 0)


class ModuleCalls:
    """Finds the groups of calls in a run of a model, and records their arguments."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        targets = [target for target in find_sites(model) if target.point.attends]
        self._targets = {target.name: target for target in targets if target.point.fault(target.module) is None}
        self._groups: dict[tuple[str, Environment], Group] = {}
        self._recorded: dict[str, dict[CallId, RecordedCall]] = {}

    @property
    def groups(self) -> list[Group]:
        return list(self._groups.values())

    @contextmanager
    def finding(self) -> Iterator[None]:
        """Context manager for the first run, which must run backends. It finds the groups and records their calls."""
        with self._recording(PATCHED, self._is_new):
            yield

    def backends(self) -> dict[str, Backend]:
        """Return the backend of each site for the second run: the model's code at the sites of all groups."""
        measured = {name for group in self.groups for name in group.names}
        sites = [target.name for target in find_sites(self._model) if target.point.attends]
        return {glob.escape(name): CONTENDERS[NATIVE if name in measured else PATCHED] for name in sites}

    @contextmanager
    def repeating(self) -> Iterator[None]:
        """Context manager for the second run, which must run the model's code. It records the same calls."""
        wanted = {identity for group in self.groups for identity in (group.first, group.last)}
        with self._recording(NATIVE, lambda identity, module, args, kwargs: identity in wanted):
            yield

    def recorded(self, group: Group, contender: str) -> list[tuple[str, RecordedCall]]:
        """Return the module name and arguments of each call of one run. Empty if the second run lacks a call."""
        calls = self._recorded[contender]
        known = [(identity[0], calls[identity]) for identity in group.runs() if identity in calls]
        return known if len(known) == len(group.runs()) else []

    @contextmanager
    def _recording(self, contender: str, wanted: Callable[..., bool]) -> Iterator[None]:
        modules = {name: target.module for name, target in self._targets.items()}
        with recording_calls(modules, wanted) as self._recorded[contender]:
            yield

    def _is_new(self, identity: CallId, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        target = self._targets[identity[0]]
        states = hidden_states(target.point, args, kwargs)
        requests = target.point.requests(module)
        if states is None or not requests:
            return False
        call = describe_call(target.point, module, states, kwargs)
        if kind_of(requests, target.point.original_kernel(module)).startswith("dense in eager"):
            grids = GRIDS + (GRIDS_KEPT if call.mode == TRAINING else 0)
            if count_scores(requests, call) * states.itemsize * grids > DENSE_BYTES:
                return False  # the model's code might fill the memory
        request = request_of(target.point, module, call)
        group = Group(target, request, call, states.device, identity, identity, {identity[0]})
        known = self._groups.setdefault((group.key, group.environment), group)
        if known is group:
            return True
        if identity[0] in known.names:
            return False
        known.names.add(identity[0])
        if target.point.shared_in is None:
            return False
        if known.last != known.first:
            self._recorded[PATCHED].pop(known.last, None)
        known.last = identity
        return True


def race_modules(model: nn.Module, calls: ModuleCalls, group: Group, rounds: int, tick: Clock) -> Measurement | None:
    """Time the model's code and the backends on a group of calls. Return None if the model's code cannot run them."""
    grad = group.call.mode == TRAINING
    device = group.device
    outcomes: dict[str, Outcome] = {}
    runs: dict[str, Preparation] = {}
    for name, backend in CONTENDERS.items():
        recorded = calls.recorded(group, name)
        if not recorded:
            return None
        prepare = partial(_prepared, model, backend, recorded, grad)
        first, problem, out_of_memory = 0.0, "", False
        observed = _Observed(grad)
        try:
            with prepare(1, observed) as (step,):
                start = tick()
                step()
                synchronize(device)
                first = tick() - start
            problem = observed.wrong()
        except Exception as error:  # a backend may raise anything
            problem, out_of_memory = raised(error), is_out_of_memory(error)
        if name == NATIVE and not problem and observed.kernels != {NATIVE}:
            return None
        code = code_of(group.target.cls) if name == NATIVE else codes_of(observed.backends)
        kernel = "+".join(sorted(observed.kernels))
        is_wrong = bool(problem) and not out_of_memory
        outcomes[name] = Outcome(code, first=first, kernel=kernel, reason=problem, wrong=is_wrong)
        if not problem:
            runs[name] = prepare
    outcomes = time_in_turns(outcomes, runs, device, rounds, tick)
    return Measurement(group.request, group.call.size, outcomes, group.where)


class _Observed:
    """The kernels, backends and attentions of the first run of a contender."""

    def __init__(self, grad: bool) -> None:
        self._grad = grad
        self._attentions: dict[Request, tuple[Attention, Backend]] = {}
        self.sites: list[Site] = []

    @property
    def kernels(self) -> set[str]:
        return {kernel for site in self.sites for kernel in site.kernels}

    @property
    def backends(self) -> list[Backend]:
        return [backend for _, backend in self._attentions.values()]

    def observe(self, site: Site, attention: Attention, result: Result, ran: Backend) -> None:
        self._attentions.setdefault(attention.request(), (attention, ran))

    def wrong(self) -> str:
        """Return the checks of attentions that fail the error rule, as text. Empty if all checks pass."""
        pairs = self._attentions.values()
        reports = [check_attention("tune", attention, ran, grad=self._grad, max_rows=ROWS) for attention, ran in pairs]
        return "; ".join(str(check) for report in reports for check in report.checks if not check.ok)


@contextmanager
def _prepared(
    model: nn.Module,
    backend: Backend,
    recorded: Sequence[tuple[str, RecordedCall]],
    grad: bool,
    count: int,
    observed: _Observed | None = None,
) -> Iterator[list[Callable[[], None]]]:
    """Context manager that patches the model and yields ``count`` functions that each run the recorded calls once.

    There are fewer functions if the copies of the calls would need more than ``DENSE_BYTES``.
    """
    bytes_of_calls = sum(call.nbytes() for _, call in recorded)
    count = max(1, min(count, DENSE_BYTES // max(1, bytes_of_calls)))
    with patch(model, backend) as handle:
        if observed is not None:
            observed.sites.extend(handle.sites)
            for site in handle.sites:
                site.observer = observed.observe
        copies = [[(model.get_submodule(name), call.fresh()) for name, call in recorded] for _ in range(count)]
        yield [partial(_run, copy, grad) for copy in copies]


def _run(calls: Sequence[tuple[nn.Module, RecordedCall]], grad: bool) -> None:
    for module, call in calls:
        leaves: list[Tensor] = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if grad:
            leaves += [leaf.requires_grad_() for leaf in call.leaves()]
        with torch.set_grad_enabled(grad):
            output = _first_tensor(module(*call.args, **call.kwargs))
            if grad and output.requires_grad:
                torch.autograd.grad(output, leaves, torch.ones_like(output), allow_unused=True)


def _first_tensor(returned: Any) -> Tensor:
    while not isinstance(returned, Tensor):
        returned = next(iter(returned.values() if isinstance(returned, Mapping) else returned))
    return returned
