"""The backend ``native``, and the decision of ``auto`` between the model's code and an exact backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from attnzoo.adapter import PatchPoint
from attnzoo.auto import cache
from attnzoo.auto.calls import ModuleCall, drops_weights, hidden_states, properties
from attnzoo.auto.choice import BY_REQUEST, by_priority_because
from attnzoo.auto.environment import environment_of
from attnzoo.auto.measurements import key_of
from attnzoo.auto.modules import by_measurement, request_of
from attnzoo.auto.rule import native_because
from attnzoo.backend import Backend, Choice
from attnzoo.errors import Refusal
from attnzoo.registry import registry
from attnzoo.spec.autocast import active_autocast
from attnzoo.spec.segments import Request
from attnzoo.spec.transforms import transforms_around

# "auto" decides by measurement or by rule. "always" runs the model's code wherever its results are right. ``tune``
# compares "always" with "never".
Preference = Literal["auto", "always", "never"]
# A model sees many lengths. Without this limit, the decisions for all of them would stay in memory.
_MOST_DECISIONS = 1024


@dataclass(frozen=True)
class NativeBackend(Backend):
    """Backend that runs the model's original code. A site runs its original forward and never calls :meth:`run`."""

    name: ClassVar[str] = "native"

    def refusals(self, request: Request) -> tuple[Refusal, ...]:
        return ()


class NativeChooser:
    """Decides for each call of one patched module whether ``auto`` runs the model's code.

    The chooser stores its decisions by the properties of a call. To find a stored decision takes a few microseconds.
    """

    def __init__(self, point: PatchPoint, preference: Preference) -> None:
        self._point, self._preference = point, preference
        self._decisions: dict[tuple[Any, ...], Choice | None] = {}
        self._always_serves = type(point).original_serves is PatchPoint.original_serves

    def choose(self, module: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Choice | None:
        """Return ``native`` with the reason, or None if a backend must compute the attention of this call.

        The model's code never runs if the call requests probabilities (the code may ignore this), if a ``torch.func``
        transform is active, or if the code is wrong for the arguments.
        """
        point = self._point
        states = hidden_states(point, args, kwargs)
        if states is None:
            return self._choose_undescribed(module, args, kwargs)
        described = properties(point, module, states, kwargs)
        key = (
            described,
            drops_weights(point, module),
            states.dtype,
            states.device,
            point.original_kernel(module),
            active_autocast(described[-1]),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_num_threads(),
            registry.generation,
            cache.generation(),
        )
        try:
            choice = self._decisions[key]
        except KeyError:
            if len(self._decisions) >= _MOST_DECISIONS:
                self._decisions.clear()
            choice = self._decisions[key] = self._decide(module, ModuleCall(*described), states.device)
        if choice is None or point.wants_probabilities(module, kwargs) or transforms_around((states,)):
            return None
        return choice if self._always_serves or point.original_serves(module, *args, **kwargs) else None

    def _choose_undescribed(self, module: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Choice | None:
        """Choose for a call without hidden states ``(batch, length, embed)``, about which no rule is known."""
        point = self._point
        priority = self._preference == "auto" and by_priority_because() == BY_REQUEST
        if priority or point.fault(module) is not None or point.wants_probabilities(module, kwargs):
            return None
        if transforms_around((*args, *kwargs.values())) or not point.original_serves(module, *args, **kwargs):
            return None
        return Choice(NativeBackend(), "by rule: the call has no hidden states (batch, length, embed)")

    def _decide(self, module: Any, call: ModuleCall, device: torch.device) -> Choice | None:
        point = self._point
        if point.fault(module) is not None:
            return None
        if self._preference == "always":
            return Choice(NativeBackend(), "preferred to every backend")
        requests = point.requests(module)
        if requests and by_priority_because() is None:
            measurement = cache.find(environment_of(device), key_of(request_of(point, module, call), call.size))
            decision = None if measurement is None else by_measurement(measurement, type(module))
            if decision is not None:
                return Choice(NativeBackend(), decision.reason) if decision.native else None
        reason = native_because(requests, point.original_kernel(module), call, drops_weights(point, module))
        return None if reason is None else Choice(NativeBackend(), reason)
