"""Judging a model's own attention code, module by module: the baseline beside every backend.

A module's own code hands out no ``Attention``, so it is judged by what it returns. Each module
runs again on the inputs that it had in the model: with its own code, with plain operations in the same dtype, and with
the oracle in float64. The error rule then applies to its output on real tokens, and to the gradient with respect to its
inputs and its parameters.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnzoo.backend import Backend
from attnzoo.conformance import error_rule
from attnzoo.conformance.attention_report import AttentionReport
from attnzoo.conformance.recomputed import RecomputedBackend
from attnzoo.patching.patch import patch
from attnzoo.verification.model_runs import cast, gradient_of


class Call(NamedTuple):
    """The arguments of one forward of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextmanager
def recorded(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Call]]:
    """Record the arguments of the first call of each of these modules, by name, as they are before the call."""
    calls: dict[str, Call] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name not in calls:
                calls[name] = Call(cast(args, None), cast(kwargs, None))

        return record

    handles = [model.get_submodule(n).register_forward_pre_hook(hook(n), with_kwargs=True) for n in names]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


class ModuleRuns:
    """Runs of modules on recorded calls.

    Args:
        calls: by name of the module.
        choices: by name, the keyword arguments that make a call repeat a module's random choices, call by call.
        rows: which rows of a module's output ``(batch, length, ...)`` belong to real tokens, by name; None: all.
        gradients: whether to compare gradients.
        seed: of the random function whose gradient is taken.
    """

    def __init__(
        self,
        calls: Mapping[str, Call],
        choices: Mapping[str, list[dict[str, Any]]],
        rows: Callable[[str, Tensor], Tensor | None],
        gradients: bool,
        seed: int,
    ) -> None:
        repeated = {name: next(iter(choices.get(name, ())), {}) for name in calls}
        self._calls = {name: Call(args, {**kwargs, **repeated[name]}) for name, (args, kwargs) in calls.items()}
        self._rows, self._gradients, self._seed = rows, gradients, seed
        self._own: dict[str, dict[str, Tensor]] = {}
        self._plain: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}

    def run_own(self, model: nn.Module, names: Iterable[str], dtype: torch.dtype | None = None) -> None:
        """Run the own code of modules of an unpatched model; on inputs of a dtype, None: as they were."""
        for name in names:
            self._own[name] = self._run(model, name, dtype, None)

    def run_plain(self, model: nn.Module) -> None:
        """Run plain operations in the dtype of an unpatched model: keeping weights, and computing scores again."""
        for name in self._calls:
            again = self._run(model, name, None, RecomputedBackend()) if self._gradients else {}
            self._plain[name] = self._run(model, name, None, "eager"), again

    def reports(self, model: nn.Module, dtype: torch.dtype) -> tuple[AttentionReport, ...]:
        """Judge each module's own code by the oracle in an unpatched float64 model.

        Args:
            model: the model in float64.
            dtype: of the runs of the own code, or of the precision that is asked of it.
        """
        return tuple(
            AttentionReport(name, "native", self._checks(name, self._run(model, name, torch.float64, "eager"), dtype))
            for name in self._own
        )

    def _checks(self, name: str, reference: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[error_rule.Check, ...]:
        own, (eager, again) = self._own[name], self._plain[name]
        checks = []
        for what, true in reference.items():
            k, other = error_rule.factor(what), (again[what],) if "gradient" in what else ()
            checks.append(error_rule.check(what, own[what], true, eager[what], k, dtype, recomputed=other))
        return tuple(checks)

    def _run(
        self, model: nn.Module, name: str, dtype: torch.dtype | None, backend: str | Backend | None
    ) -> dict[str, Tensor]:
        args, kwargs = cast(self._calls[name].args, dtype), cast(self._calls[name].kwargs, dtype)
        module = model.get_submodule(name)
        wanted: list[Tensor] = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if self._gradients:
            states = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and _is_states(x)]
            wanted += [x.requires_grad_() for x in states]
        torch.manual_seed(self._seed)
        patched = nullcontext() if backend is None else patch(model, {glob.escape(name): backend})
        with patched, torch.set_grad_enabled(self._gradients):
            output = _first_output(module(*args, **kwargs))
            real = self._rows(name, output)
            output = output if real is None else output[real]
        found = {"output": output.detach()}
        if self._gradients and output.requires_grad:
            found["gradient"] = gradient_of([output], wanted, self._seed)
        return found


def _is_states(tensor: Tensor) -> bool:
    """Whether an argument is hidden states ``(batch, length, dim)``: masks and biases have other ranks."""
    return tensor.is_floating_point() and tensor.ndim == 3


def _first_output(returned: Any) -> Tensor:
    items = returned.values() if isinstance(returned, Mapping) else returned
    parts = (returned,) if isinstance(returned, Tensor) else tuple(items)
    return next(part for part in parts if isinstance(part, Tensor) and part.is_floating_point())
