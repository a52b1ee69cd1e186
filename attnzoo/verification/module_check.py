"""Compare a model's own attention code with the oracle, module by module.

A module's own code builds no ``Attention``, so the outputs of the module are compared. Each module runs again on the
recorded inputs: with its own code, with plain operations in the same dtype, and with the oracle in float64. The error
rule applies to the output on real tokens, and to the gradient with respect to the module's inputs and parameters.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnzoo.backend import Backend
from attnzoo.conformance import error_rule
from attnzoo.conformance.attention_check import AttentionReport
from attnzoo.conformance.recomputed import RecomputedBackend
from attnzoo.patching.patch import patch
from attnzoo.verification.model_runs import cast, gradient_of


class Call(NamedTuple):
    """The arguments of one forward of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def cast(self, dtype: torch.dtype | None) -> Call:
        """Return a copy with all floating-point tensors in ``dtype``. None means that each tensor keeps its dtype."""
        return Call(cast(self.args, dtype), cast(self.kwargs, dtype))


@contextmanager
def recorded(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Call]]:
    """Context manager that records the arguments of the first call of each named module.

    The arguments are copied, because the call may change them, for example by filling a cache.
    """
    calls: dict[str, Call] = {}

    def record(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name not in calls:
            calls[name] = Call(args, kwargs).cast(None)

    modules = {name: model.get_submodule(name) for name in names}
    handles = [m.register_forward_pre_hook(partial(record, name), with_kwargs=True) for name, m in modules.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


class ModuleRuns:
    """Runs of modules on recorded calls.

    Args:
        random_choices: for each module name and call, the arguments with which the call repeats its random choices.
        real_rows: function of a module name and an output ``(batch, length, ...)``. It returns which rows are real
            tokens, or None if all rows are real tokens.
    """

    def __init__(
        self,
        calls: Mapping[str, Call],
        random_choices: Mapping[str, list[dict[str, Any]]],
        real_rows: Callable[[str, Tensor], Tensor | None],
        gradients: bool,
        seed: int,
    ) -> None:
        repeated = {name: next(iter(random_choices.get(name, ())), {}) for name in calls}
        self._calls = {name: Call(args, {**kwargs, **repeated[name]}) for name, (args, kwargs) in calls.items()}
        self._real_rows, self._gradients, self._seed = real_rows, gradients, seed
        self._own: dict[str, dict[str, Tensor]] = {}
        self._eager: dict[str, dict[str, Tensor]] = {}
        self._recomputed: dict[str, dict[str, Tensor]] = {}

    def run_own(self, model: nn.Module, names: Iterable[str], dtype: torch.dtype | None = None) -> None:
        """Run the original code of the named modules on the recorded inputs. ``model`` must be unpatched."""
        self._own |= {name: self._run(model, name, dtype, None) for name in names}

    def run_plain(self, model: nn.Module) -> None:
        """Run each module with ``eager`` and, if gradients are compared, also with :class:`RecomputedBackend`."""
        for name in self._calls:
            if self._gradients:
                self._recomputed[name] = self._run(model, name, None, RecomputedBackend())
            self._eager[name] = self._run(model, name, None, "eager")

    def reports(self, model: nn.Module, dtype: torch.dtype) -> tuple[AttentionReport, ...]:
        """Compare the results of :meth:`run_own` with the oracle in a float64 ``model``, with budgets for ``dtype``."""
        return tuple(AttentionReport(name, "native", self._checks(model, name, dtype)) for name in self._own)

    def _checks(self, model: nn.Module, name: str, dtype: torch.dtype) -> tuple[error_rule.Check, ...]:
        own, eager = self._own[name], self._eager[name]
        checks = []
        for what, exact in self._run(model, name, torch.float64, "eager").items():
            recomputed = (self._recomputed[name][what],) if what == "gradient" else ()
            k = error_rule.factor(what)
            checks.append(error_rule.check(what, own[what], exact, eager[what], k, dtype, recomputed=recomputed))
        return tuple(checks)

    def _run(
        self, model: nn.Module, name: str, dtype: torch.dtype | None, backend: str | Backend | None
    ) -> dict[str, Tensor]:
        args, kwargs = self._calls[name].cast(dtype)
        module = model.get_submodule(name)
        leaves: list[Tensor] = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if self._gradients:
            states = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and _is_hidden_states(x)]
            leaves += [x.requires_grad_() for x in states]
        torch.manual_seed(self._seed)
        patched = nullcontext() if backend is None else patch(model, {glob.escape(name): backend})
        with patched, torch.set_grad_enabled(self._gradients):
            output = _first_output(module(*args, **kwargs))
            real = self._real_rows(name, output)
            output = output if real is None else output[real]
        results = {"output": output.detach()}
        if self._gradients and output.requires_grad:
            results["gradient"] = gradient_of([output], leaves, self._seed)
        return results


def _is_hidden_states(tensor: Tensor) -> bool:
    """Whether a tensor has the shape ``(batch, length, dim)`` of hidden states. Masks and biases have other ranks."""
    return tensor.is_floating_point() and tensor.ndim == 3


def _first_output(returned: Any) -> Tensor:
    items = returned.values() if isinstance(returned, Mapping) else returned
    parts = (returned,) if isinstance(returned, Tensor) else tuple(items)
    return next(part for part in parts if isinstance(part, Tensor) and part.is_floating_point())
