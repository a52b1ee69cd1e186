"""``verify``: check, on a user's inputs, that a patched model computes the same numbers as the original."""

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
from attnzoo.conformance.error_rule import Check
from attnzoo.conformance.recomputed import RecomputedBackend
from attnzoo.errors import InvalidArgumentError
from attnzoo.patching.patch import Handle, patch, unpatch_all
from attnzoo.patching.replay import own_random_stream, recording, replaying
from attnzoo.patching.sites import Site, check_model
from attnzoo.spec.segments import Attention, Request, Result
from attnzoo.spelling import spell
from attnzoo.verification.excerpt import excerpt, remark
from attnzoo.verification.model_runs import GRADIENT, WITH_GRAPH, cast, check_gradient_mode, rows_of_modules, run_model
from attnzoo.verification.module_check import ModuleRuns, recorded
from attnzoo.verification.oracles import oracles
from attnzoo.verification.reports import Report


def verify(
    model: nn.Module,
    inputs: Mapping[str, Any],
    backend: str | Backend | Mapping[str, str | Backend] = "sdpa",
    *,
    gradients: bool = True,
    max_rows: int = 128,
    seed: int = 0,
    fast: bool = False,
    progress: Callable[[float, str], None] = lambda done, what: None,
    **options: Any,
) -> Report:
    """Compare a patched model with the original under the error rule, end to end and attention by attention.

    The reference is the model with the dense oracle in float64. ``verify`` compares two runs with this reference: the
    patched model, and the model's own code. It compares the outputs (without tokens that the input ``attention_mask``
    hides), the parameter gradient, and each attention. The error of plain operations in the model's dtype sets the
    error budgets. With ``backend="native"``, ``verify`` checks only the model's own code.

    The model runs in eval mode. ``verify`` changes neither the model nor its gradients nor the state of random number
    generators. It needs memory for a copy of the model in float64 and for ``length x length`` scores.

    Args:
        model: a model of a family with an adapter. A patched model is compared with an unpatched copy.
        inputs: keyword arguments of the model's forward, as a tokenizer returns them.
        backend: a backend, or a mapping of globs to backends, as for :func:`attnzoo.patch`.
        gradients: whether gradients are compared, too.
        max_rows: maximum number of query rows to compare in each attention.
        seed: seed of all random numbers, such as the output gradients from which the backward starts.
        fast: whether to finish in seconds instead of minutes. ``verify`` then uses only the first 256 real tokens of
            one sample, which ``report.note`` names. It skips the end-to-end gradients and the separate check of each
            module's own code.
        progress: function that is called with the completed share of the work (0 to 1) and the name of the next step.
        options: options of the backend.

    Returns:
        A report. ``report.ok`` is True if every error is within its budget. ``print(report)`` prints a table.

    Raises:
        InvalidArgumentError: an argument is invalid, or the model returns no tensor to compare.
        Exception: any exception that :func:`attnzoo.patch` or the model raises.

    Example:
        >>> import torch, transformers, attnzoo
        >>> config = transformers.GPTNeoXConfig(
        ...     vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        ... )
        >>> model = transformers.GPTNeoXForCausalLM(config).eval()
        >>> attnzoo.verify(model, {"input_ids": torch.arange(12)[None]}, "sdpa").ok
        True
    """
    check_model(model)
    check_max_rows(max_rows)
    if not isinstance(inputs, Mapping):
        raise InvalidArgumentError("inputs", type(inputs).__name__, "a mapping of keyword arguments of model.forward")
    check_gradient_mode(gradients)
    cut = remark(inputs) if fast else ""
    inputs = excerpt(inputs) if fast else dict(inputs)

    def apply_patch(model: nn.Module) -> Handle:
        return patch(model, backend, **options)

    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    # Even in a float64 model, the model's own code computes the softmax in float32. So it runs in float32 instead.
    own_dtype = error_rule.plain_dtype(dtype)
    wide = own_dtype != dtype

    with own_random_stream(model), _eval_mode(model):
        progress(0.0, "the patched model")
        patched = _PatchedRun(model, inputs, apply_patch(model), gradients, seed, fast)
        got, native, random_choices = patched.outputs, patched.native, patched.random_choices
        run = partial(run_model, gradients=patched.whole, seed=seed)
        oracle = partial(oracles, patched.approximate)
        plain = copy.deepcopy(model)
        unpatch_all(plain)
        narrow = copy.deepcopy(plain).float() if wide else plain
        narrow_inputs = cast(inputs, torch.float32) if wide else inputs
        # LSH models use the score -1e5 to hide a token from itself. Float32 scores of this size are too coarse, so the
        # own code of LSH models runs in float64, with the error budget of the model's dtype.
        in_float64 = [] if patched.fault else list(random_choices)
        original: dict[str, Tensor] = {}
        again: dict[str, Tensor] = {}

        progress(0.1, "the model's own code")
        to_record = [] if patched.fault else [site.name for site in patched.sites if site.name in native or not fast]
        with replaying(narrow, random_choices), recorded(narrow, to_record) as calls:
            if not patched.fault:
                original = run(narrow, narrow_inputs, gradients=patched.whole and not in_float64, inference=True)
        if native and wide and not in_float64:
            with replaying(narrow, random_choices), apply_patch(narrow):
                got = run(narrow, narrow_inputs, inference=True)
        progress(0.2, "the model's own code, module by module")
        modules = ModuleRuns(calls, random_choices, rows_of_modules(model, inputs), gradients, seed)
        modules.run_own(narrow, [name for name in calls if name not in in_float64])
        modules.run_plain(narrow)
        progress(0.3, "plain operations")
        with replaying(narrow, random_choices), patch(narrow, oracle()):
            eager = run(narrow, narrow_inputs)
        if patched.whole:
            progress(0.4, "plain operations that compute scores again")
            with replaying(narrow, random_choices), patch(narrow, oracle(RecomputedBackend())):
                again = run(narrow, narrow_inputs)
        del narrow

        double = cast(inputs, torch.float64)
        plain.double()
        if in_float64:
            progress(0.5, "the model's own code in float64")
            with replaying(plain, random_choices):
                original = run(plain, double)
            modules.run_own(plain, [name for name in in_float64 if name in calls], torch.float64)
            if native:
                with replaying(plain, random_choices), apply_patch(plain):
                    got = run(plain, double, inference=True)
        progress(0.6, "the oracle in float64")
        with replaying(plain, random_choices), patch(plain, oracle()):
            reference = run(plain, double)
        progress(0.8, "the oracle in float64, module by module")
        original_sites = modules.reports(plain, own_dtype)
        del plain
        sites = [report for report in original_sites if report.name in native]
        for number, ((name, _), (attention, kernel, ran)) in enumerate(patched.attentions.items()):
            progress(0.9 + 0.1 * number / len(patched.attentions), name)
            report = check_attention(name, attention, ran, grad=gradients, max_rows=max_rows, seed=seed)
            sites.append(replace(report, kernel=kernel))
    progress(1.0, "done")

    def compare(values: dict[str, Tensor], dtype: torch.dtype) -> Iterator[Check]:
        for name, value in values.items():
            what = name.removesuffix(WITH_GRAPH)
            if what in reference:
                recomputed = (again[what],) if what == GRADIENT else ()
                dtypes, k = (dtype, error_rule.plain_dtype(dtype)), error_rule.factor(what)
                yield error_rule.check(name, value, reference[what], eager[what], k, *dtypes, recomputed)
        # An output that the reference returns and this run did not return is a failed check.
        suffixes = ("", WITH_GRAPH) if any(name.endswith(WITH_GRAPH) for name in values) else ("",)
        expected = dict.fromkeys(what if what == GRADIENT else what + end for end in suffixes for what in reference)
        yield from (Check(name, math.inf, 0.0, 0.0, 0.0) for name in expected if values and name not in values)

    distance = {}
    if patched.changed:
        distance = {
            what: float((original[what].double() - exact).abs().max() / exact.abs().max())
            for what, exact in reference.items()
            if what in original and what != GRADIENT
        }
        original = {}
    return Report(
        backend=_label(backend),
        sites=tuple(sites),
        end_to_end=tuple(compare(got, own_dtype if native else dtype)),
        original=tuple(compare(original, own_dtype)),
        original_sites=original_sites,
        fault=patched.fault,
        note="; ".join([*filter(None, [cut]), *patched.notes(in_float64)]),
        changed=patched.changed,
        distance=distance,
    )


class _PatchedRun:
    """The observations of one run of the patched model.

    Attributes:
        attentions: for each site and request, one attention, its kernel and its backend.
        approximate: for each site, the backend that changed the pattern, and the random choices of each call.
        random_choices: for each module, one item per call: the arguments that repeat its hash buckets (``replay.py``).
        fault: the reason why the model's own code is wrong. Empty if the code is right.
        whole: whether gradients are compared end to end. If so, ``outputs`` includes the parameter gradient.
    """

    def __init__(
        self, model: nn.Module, inputs: dict[str, Any], patching: Handle, gradients: bool, seed: int, fast: bool
    ) -> None:
        self._gradients, self._fast = gradients, fast
        self.attentions: dict[tuple[str, Request], tuple[Attention, str, Backend]] = {}
        self.approximate: dict[str, tuple[Backend, list[object]]] = {}
        with patching as handle:
            self.sites = handle.sites
            for site in handle.sites:
                site.observer = self._observe
            targets = [f.of(module) for f in handle.forwards if (module := f.module) is not None]
            self.fault = next((reason for target in targets if (reason := target.point.fault(target.module))), "")
            self._trainable = not any(target.point.backward_in_training for target in targets)
            self.whole = gradients and self._trainable and not fast
            if self.whole and any(p.is_meta and p.requires_grad for p in model.parameters()):
                raise InvalidArgumentError("gradients", "True for offloaded weights", "False, or all weights in memory")
            hashing = {t.name: (t.module, t.point.replay) for t in targets if t.point.makes_random_choices}
            with recording(hashing) as self.random_choices:
                self.outputs = run_model(model, inputs, self.whole, seed, inference=True, graph=gradients and fast)
        self.native = {site.name for site in self.sites if "native" in site.kernels}
        self.changed = "; ".join(dict.fromkeys(site.approximate for site in self.sites if site.approximate))

    def _observe(self, site: Site, attention: Attention, result: Result, backend: Backend) -> None:
        request = attention.request()
        segments = tuple(replace(segment, bias_grad=False) for segment in request.segments)
        key = site.name, replace(request, grad=False, segments=segments)
        if request.grad or key not in self.attentions:  # prefer an attention with gradients
            self.attentions[key] = attention, result.kernel, backend
        if not backend.capabilities.exact:
            self.approximate.setdefault(site.name, (backend, []))[1].append(backend.decisions(attention))

    def notes(self, in_float64: list[str]) -> Iterator[str]:
        """Yield a remark on each comparison that was left out, or that did not use the model's dtype."""
        if self._gradients and self._fast:
            yield "end-to-end gradients are not compared, because fast=True"
        elif self._gradients and not self._trainable:
            yield "gradients are compared per attention only, because this model's backward requires training mode"
        if in_float64:
            yield f"the model's own code ran in float64 at {', '.join(in_float64)}"
        if fell_back := [site.name for site in self.sites if site.fallbacks]:
            yield f"calls fell back to the model's own code, which only the outputs show, at {', '.join(fell_back)}"
        if unreached := [site.name for site in self.sites if not site.calls and not site.fallbacks]:
            yield f"not checked, because these inputs do not reach them: {', '.join(unreached)}"


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
