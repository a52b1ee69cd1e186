"""Proving that a patch changes nothing but speed and memory, on the user's own model and inputs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.backend import Backend
from attnzoo.conformance import error_rule
from attnzoo.conformance.attention_check import check_attention, check_max_rows
from attnzoo.conformance.attention_report import AttentionReport, worst
from attnzoo.conformance.error_rule import Check
from attnzoo.conformance.recomputed import RecomputedBackend
from attnzoo.errors import InvalidArgumentError
from attnzoo.patching.patch import patch, unpatch_all
from attnzoo.patching.replay import own_random_stream, recording, replaying
from attnzoo.patching.sites import Site
from attnzoo.spec.segments import Attention, Request, Result
from attnzoo.spelling import spell
from attnzoo.verification.excerpt import excerpt
from attnzoo.verification.model_runs import GRADIENT, cast, rows_of_modules, run_model
from attnzoo.verification.module_check import ModuleRuns, recorded
from attnzoo.verification.oracles import oracles
from attnzoo.verification.reports import Report

Progress = Callable[[float, str], None]

__all__ = ["AttentionReport", "Report", "check_attention", "verify", "worst"]


def verify(
    model: nn.Module,
    inputs: Mapping[str, Any],
    backend: str | Backend | Mapping[str, str | Backend] = "sdpa",
    *,
    gradients: bool = True,
    max_rows: int = 128,
    seed: int = 0,
    fast: bool = False,
    progress: Progress = lambda done, what: None,
    **options: Any,
) -> Report:
    """Compare a patched model with the original, end to end and per attention, under the error rule of the contract.

    The reference is the model with the dense oracle in float64 (models' own code takes its softmax in float32 even
    there, so the original of a float64 model is judged in float32). On real tokens (``attention_mask``), the patched
    model and the model's own code are compared with it; plain operations in the model's own dtype set the budgets. Each
    attention of the patched model is compared with the oracle on the inputs that the model gave it, and each attention
    module of the model's own code with the oracle on the inputs of the module. So the report shows the original's own
    kernels under the same rule. ``backend="native"`` reports them alone.

    Runs in eval mode (no dropout); leaves the model, its gradients and the random stream as they were. Takes a copy of
    the model, twice as wide for float32, and dense ``length x length`` scores: mind the length of the inputs.

    Args:
        model: a model of a family with an adapter; may be patched (the copy compared with is not).
        inputs: keyword arguments of its forward, as a tokenizer returns them.
        backend: as for :func:`attnzoo.patch`.
        gradients: compare parameter gradients too.
        max_rows: query rows to judge per attention.
        seed: of the random cotangents.
        fast: for a look that takes seconds: read one sample only, and no more than its first 256 real tokens; compare
            gradients at each attention but not end to end, and the model's own code end to end but not by modules
            (unless ``"native"`` runs there).
        progress: called with how much of the work is done (0 to 1) and what happens next.
        options: go to the backend.

    Returns:
        A :class:`Report`; ``.ok`` says whether everything is within its error budget.

    Raises:
        InvalidArgumentError: a bad argument, or the model returns nothing to compare.
        Whatever :func:`attnzoo.patch` or the model raises.
    """
    if not isinstance(model, nn.Module):
        raise InvalidArgumentError("model", type(model).__name__, "a torch.nn.Module")
    check_max_rows(max_rows)
    if not isinstance(inputs, Mapping):
        raise InvalidArgumentError("inputs", type(inputs).__name__, "a mapping of keyword arguments of model.forward")
    if gradients and torch.is_inference_mode_enabled():
        raise InvalidArgumentError("gradients", "True inside torch.inference_mode()", "False, or outside of it")
    inputs = excerpt(inputs) if fast else dict(inputs)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    wide = dtype == torch.float64
    seen: dict[tuple[str, Request], tuple[Attention, str, Backend]] = {}
    rewriters: dict[str, tuple[Backend, list[object]]] = {}

    def observe(site: Site, attention: Attention, result: Result, ran: Backend) -> None:
        request = attention.request()
        asked = site.name, _without_gradients(request)
        if request.grad or asked not in seen:  # where both are asked, the one that trains is judged both ways
            seen[asked] = attention, result.kernel, ran
        if not ran.capabilities.exact:
            rewriters.setdefault(site.name, (ran, []))[1].append(ran.choices(attention))

    with own_random_stream(model), _eval_mode(model):
        with patch(model, backend, **options) as handle:
            for site in handle.sites:
                site.observer = observe
            found = [forward.of(module) for forward in handle.forwards if (module := forward.module) is not None]
            fault = next((reason for one in found if (reason := one.point.fault(one.module))), "")
            choosing = {one.name: (one.module, one.point.replay) for one in found if one.point.replay is not None}
            # Whose backward works in training only is compared end to end forward; its attentions, backward too.
            trainable = not any(one.point.backward_in_training for one in found)
            whole = gradients and trainable and not fast
            if whole and any(p.is_meta and p.requires_grad for p in model.parameters()):
                raise InvalidArgumentError("gradients", "True for offloaded weights, which have none", "False")
            run = partial(run_model, gradients=whole, seed=seed)
            progress(0.0, "the patched model")
            with recording(choosing) as choices:
                got = run(model, inputs, inference=not fast, graph=gradients)
        unreached = [site.name for site in handle.sites if not site.calls]
        native = [site.name for site in handle.sites if site.backend == "native" and site.calls]
        changed = "; ".join(dict.fromkeys(site.approximate for site in handle.sites if site.approximate))
        plain = copy.deepcopy(model)
        unpatch_all(plain)
        # There is no wider reference to see the roundings of a float64 model against: take those of float32 instead.
        # Models' own code takes its softmax in float32 even there, so it is run and judged in float32.
        narrow = copy.deepcopy(plain).float() if wide else plain
        narrow_inputs = cast(inputs, torch.float32) if wide else inputs
        own_dtype = torch.float32 if wide else dtype
        # LSH models hide a token from itself with -1e5, which leaves float32 little of the score: their own code runs
        # in float64, and is judged by the roundings of the model's dtype.
        coarse = [name for name in choices if not fault]
        original: dict[str, Tensor] = {}
        again: dict[str, Tensor] = {}
        progress(0.1, "the model's own code")
        attending = [] if fault else [site.name for site in handle.sites if site.name in native or not fast]
        with replaying(narrow, choices), recorded(narrow, attending) as calls:
            if not fault:
                original = run(narrow, narrow_inputs, gradients=whole and not coarse, inference=True)
        if native and wide and not coarse:
            with replaying(narrow, choices), patch(narrow, backend, **options):
                got = run(narrow, narrow_inputs, inference=True)
        progress(0.2, "the model's own code, module by module")
        modules = ModuleRuns(calls, choices, rows_of_modules(model, inputs), gradients, seed)
        modules.run_own(narrow, [name for name in calls if name not in coarse])
        modules.run_plain(narrow)
        progress(0.3, "plain operations")
        with replaying(narrow, choices), patch(narrow, oracles(rewriters)):
            eager = run(narrow, narrow_inputs)
        if whole:
            progress(0.4, "plain operations that compute scores again")
            with replaying(narrow, choices), patch(narrow, oracles(rewriters, RecomputedBackend())):
                again = run(narrow, narrow_inputs)
        double = cast(inputs, torch.float64)
        del narrow
        plain.double()
        if coarse:
            progress(0.5, "the model's own code in float64")
            with replaying(plain, choices):
                original = run(plain, double)
            modules.run_own(plain, [name for name in coarse if name in calls], torch.float64)
            if native:
                with replaying(plain, choices), patch(plain, backend, **options):
                    got = run(plain, double, inference=True)
        progress(0.6, "the oracle in float64")
        with replaying(plain, choices), patch(plain, oracles(rewriters)):
            reference = run(plain, double)
        progress(0.8, "the oracle in float64, module by module")
        original_sites = modules.reports(plain, own_dtype)
        del plain
        sites = [report for report in original_sites if report.name in native]
        for number, ((name, _), (attention, kernel, ran)) in enumerate(seen.items()):
            progress(0.9 + 0.1 * number / len(seen), name)
            report = check_attention(name, attention, ran, grad=gradients, max_rows=max_rows, seed=seed)
            sites.append(replace(report, kernel=kernel))
    progress(1.0, "done")

    def compare(values: dict[str, Tensor], computed: torch.dtype) -> tuple[Check, ...]:
        names = [what for what in reference if what in values]
        others = {what: (again[what],) for what in names if what == GRADIENT}
        narrower = torch.float32 if computed == torch.float64 else None
        return tuple(
            error_rule.check(
                what,
                values[what],
                reference[what],
                eager[what],
                error_rule.factor(what),
                computed,
                narrower,
                others.get(what, ()),
            )
            for what in names
        )

    # An output that the patched model loses fails, whatever the other outputs are.
    lost = tuple(Check(what, math.inf, 0.0, 0.0, 0.0) for what in reference if what not in got)
    notes, distance = [], {}
    if gradients and fast:
        notes.append("a fast look: no gradients end to end")
    elif gradients and not trainable:
        notes.append("gradients are compared per attention only: this model's backward works in training mode alone")
    if coarse:
        notes.append(f"the model's own code was run in float64 at {', '.join(coarse)}")
    if unreached:
        notes.append(f"not checked, as these inputs do not reach it: {', '.join(unreached)}")
    if changed:
        distance = {
            what: float((original[what].double() - true).abs().max() / true.abs().max())
            for what, true in reference.items()
            if what in original and what != GRADIENT
        }
        original = {}
    return Report(
        backend=_label(backend),
        sites=tuple(sites),
        end_to_end=(*compare(got, own_dtype if native else dtype), *lost),
        original=compare(original, own_dtype),
        original_sites=original_sites,
        fault=fault,
        note="; ".join(notes),
        changed=changed,
        distance=distance,
    )


def _without_gradients(request: Request) -> Request:
    segments = tuple(replace(segment, bias_grad=False) for segment in request.segments)
    return replace(request, grad=False, segments=segments)


def _label(backend: str | Backend | Mapping[str, str | Backend]) -> str:
    if isinstance(backend, Mapping):
        return ", ".join(f"{glob}={_label(name)}" for glob, name in backend.items())
    if isinstance(backend, str):
        return backend
    options = {name: value for name in backend.options() if (value := getattr(backend, name)) is not None}
    return spell(backend.name, options)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
