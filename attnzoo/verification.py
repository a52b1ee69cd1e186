"""Proving that a patch changes nothing but speed and memory, on the user's own model and inputs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo import error_rule, registry
from attnzoo.backend import Backend
from attnzoo.backends.eager import evaluate, log_mass
from attnzoo.error_rule import Check
from attnzoo.errors import InvalidArgumentError
from attnzoo.functional import execute
from attnzoo.oracles import oracles
from attnzoo.patching import patch, unpatch_all
from attnzoo.replay import recording, replaying
from attnzoo.segments import Attention, Request, Result
from attnzoo.sites import Site


@dataclass(frozen=True)
class SiteReport:
    """How one attention of one site compares with the float64 oracle on the same inputs.

    Attributes:
        name: the site.
        kernel: what really ran in the model.
        checks: the output, and the gradient with respect to queries, keys and values (and trained biases) together.
        recall: where the backend changes the pattern, the share of the unchanged attention's weight that lies on the
            keys still seen, mean over the judged rows and heads; else None.
    """

    name: str
    kernel: str
    checks: tuple[Check, ...]
    recall: float | None = None

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.ok for check in self.checks)

    @property
    def worst(self) -> Check:
        """The check that comes closest to its budget, or exceeds it most."""
        return worst(self.checks)


def worst(checks: tuple[Check, ...]) -> Check:
    """The check with the largest error for its budget."""
    return max(checks, key=lambda check: (not check.ok, check.error / check.budget if check.budget else 0.0))


@dataclass(frozen=True)
class Report:
    """What :func:`verify` found. Prints as a table; :meth:`to_dict` for JSON.

    Attributes:
        backend: the backend verified.
        sites: per attention, against the float64 oracle on the inputs the model gave it.
        end_to_end: outputs and parameter gradients on real tokens, against the model with the oracle in float64.
        original: the model's own code against the same: it says that the oracle computes what the model means.
        fault: why the model's own code is wrong, and so was not run; empty where it is right.
        note: what was not compared, and why; empty where everything was.
        changed: what the backend changed of the pattern; everything is judged with that change then. Empty: nothing.
        distance: what it makes of the model: per output, the largest difference between the model's own code and the
            reference, over the reference's largest value. Empty where nothing was changed.
    """

    backend: str
    sites: tuple[SiteReport, ...]
    end_to_end: tuple[Check, ...]
    original: tuple[Check, ...]
    fault: str = ""
    note: str = ""
    changed: str = ""
    distance: Mapping[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether everything is within its error budget, and something was checked."""
        checks = (*self.end_to_end, *self.original)
        return bool(self.sites and checks) and all(site.ok for site in self.sites) and all(one.ok for one in checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: every check with its error, budget and verdict."""
        return {
            "backend": self.backend,
            "ok": self.ok,
            "sites": [
                {
                    **{"name": site.name, "kernel": site.kernel, "ok": site.ok, "recall": site.recall},
                    "checks": [_plain(c) for c in site.checks],
                }
                for site in self.sites
            ],
            "end_to_end": [_plain(check) for check in self.end_to_end],
            "original": [_plain(check) for check in self.original],
            "fault": self.fault,
            "note": self.note,
            "changed": self.changed,
            "distance": dict(self.distance),
        }

    def __str__(self) -> str:
        rows = [("what", "kernel", "error", "budget", "verdict")]
        for site in self.sites:
            rows.append((f"{site.name}: {site.worst.what}", site.kernel, *_cells(site.worst)))
        for label, checks in (("model", self.end_to_end), ("original", self.original)):
            rows += [(f"{label}: {check.what}", "", *_cells(check)) for check in checks]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        verdict = "within the error rule" if self.ok else "NOT within the error rule"
        if not self.sites:
            verdict = "NOT shown to be within the error rule: none of its attentions ran"
        if self.fault:
            lines.append(f"the original was not run: {self.fault}")
        if self.note:
            lines.append(self.note)
        if self.changed:
            lines.append(f"the pattern was changed, and is judged as changed: {self.changed}")
        recalls = [site.recall for site in self.sites if site.recall is not None]
        if recalls:
            mean = sum(recalls) / len(recalls)
            lines.append(f"recall: {mean:.3f} of the unchanged attention's weight is on keys still seen")
        for what, far in self.distance.items():
            lines.append(f"{what} is off the unchanged model's by {far:.2g} of its largest value")
        return "\n".join([*lines, f"backend {self.backend!r}: {verdict}"])


def _plain(check: Check) -> dict[str, Any]:
    return {**asdict(check), "ok": check.ok}


def _cells(check: Check) -> tuple[str, str, str]:
    return f"{check.error:.2e}", f"{check.budget:.2e}", "ok" if check.ok else "FAILS"


def check_site(
    name: str,
    attention: Attention,
    backend: str | Backend,
    *,
    grad: bool,
    max_rows: int = 128,
    seed: int = 0,
    kernel: str | None = None,
) -> SiteReport:
    """Compare a backend with the float64 oracle on one attention, dropout off.

    A backend that changes the pattern is judged by the oracle on the changed one (:meth:`Backend.rewrite`).

    Long inputs are judged on a sample of query rows, first and last included: the oracle's rows do not depend on each
    other, and gradients are those of a cotangent that is zero elsewhere, so both are exact at any length.

    Args:
        name: for the report.
        attention: what to compute, e.g. as a site's observer saw it.
        backend: a configured backend or a name.
        grad: compare the gradients of query, keys and values too (and of bias values that require grad).
        max_rows: how many query rows to judge.
        seed: of the sample and the cotangent.
        kernel: what ran in the model, for the report; None: what runs here.
    """
    _check_rows(max_rows)
    made = registry.make_backend(backend) if isinstance(backend, str) else backend
    attention = replace(attention, dropout=0.0)
    generator = torch.Generator().manual_seed(seed)
    rows = _sample(attention.q_len, max_rows, generator).to(attention.query.device)
    shape = (attention.batch, attention.heads, len(rows), attention.value_dim)
    cotangent = torch.randn(shape, generator=generator, dtype=torch.float64).to(attention.query.device)

    choices = made.choices(attention)

    def oracle(dtype: torch.dtype) -> tuple[Tensor, ...]:
        own = _leaves(attention, dtype, grad)
        output = evaluate(made.rewrite(own, choices), rows).output
        return output, *([_gradient(output, own, cotangent)] if grad else [])

    own = _leaves(attention, attention.query.dtype, grad)
    with torch.set_grad_enabled(grad):
        result = execute(made, own)
        output = result.output[:, :, rows]
        got = (output, *([_gradient(output, own, cotangent)] if grad else []))
        # There is no wider reference to see the roundings of float64 against: take those of float32 in proportion.
        narrow = torch.float32 if attention.query.dtype == torch.float64 else None
        reference, eager = oracle(torch.float64), oracle(narrow or attention.query.dtype)
    checks = tuple(
        error_rule.check(label, one, true, plain, error_rule.factor(label), attention.query.dtype, narrow)
        for label, one, true, plain in zip(("output", "gradient"), got, reference, eager, strict=False)
    )
    recall = None if made.changes(attention.request()) is None else _recall(made, attention, choices, rows)
    return SiteReport(name, kernel or result.kernel, checks, recall)


@torch.no_grad()
def _recall(backend: Backend, attention: Attention, choices: object, rows: Tensor) -> float:
    """Each key is seen once, so the weight of those still seen is how much their scores add up to."""
    plain = _leaves(attention, torch.float64, False)
    whole, left = log_mass(plain, rows), log_mass(backend.rewrite(plain, choices), rows)
    real = whole > float("-inf")
    if attention.query_mask is not None:
        real = real & attention.query_mask[:, None, rows]
    return float((left - whole)[real].exp().mean()) if bool(real.any()) else 1.0


def _check_rows(most: object) -> None:
    if isinstance(most, bool) or not isinstance(most, int) or most < 2:
        raise InvalidArgumentError("max_rows", repr(most), "an integer >= 2: the first and the last row are among them")


def _sample(length: int, most: int, generator: torch.Generator) -> Tensor:
    if length <= most:
        return torch.arange(length)
    inner = torch.randperm(length - 2, generator=generator)[: most - 2] + 1
    return torch.cat([torch.tensor([0]), inner.sort().values, torch.tensor([length - 1])])


def _trained(attention: Attention) -> list[bool]:
    """Which of the attention's tensors get a gradient in a check: not a bias that needs none in the model."""
    flags = [True]
    for segment in attention.segments:
        flags += [True, True]
        if segment.bias is not None:
            flags.append(segment.bias.values.requires_grad)
    return flags if attention.empty is None else [*flags, True]


def _leaves(attention: Attention, dtype: torch.dtype, grad: bool) -> Attention:
    """The attention on detached tensors of a dtype."""
    pairs = zip(attention.tensors(), _trained(attention), strict=True)
    return attention.with_tensors(
        tuple(t.detach().to(dtype).clone().requires_grad_(grad and flag) for t, flag in pairs)
    )


def _gradient(output: Tensor, attention: Attention, cotangent: Tensor) -> Tensor:
    """The gradient with respect to every tensor that has one, as a single vector.

    One of them may be zero but for rounding (a query's, when it sees a single key), and rounding has no budget of its
    own; together they have a scale.
    """
    leaves = [tensor for tensor in attention.tensors() if tensor.requires_grad]
    grads = torch.autograd.grad(output, leaves, cotangent.to(output.dtype), allow_unused=True, materialize_grads=True)
    return torch.cat([grad.flatten() for grad in grads])


def verify(
    model: nn.Module,
    inputs: Mapping[str, Any],
    backend: str | Backend | Mapping[str, str | Backend] = "sdpa",
    *,
    gradients: bool = True,
    max_rows: int = 128,
    seed: int = 0,
    **options: Any,
) -> Report:
    """Compare a patched model with the original, end to end and per attention, under the error rule of the contract.

    The reference is the model with the dense oracle in float64 (models' own code takes its softmax in float32 even
    there, so the original of a float64 model is judged in float32). Against it stand, on real tokens
    (``attention_mask``), the patched model, with the oracle in the model's own dtype for the budget, and the model's
    own code, which shows that the oracle computes what the model means. Each attention is compared with the oracle on
    the inputs the model gave it, too.

    Runs in eval mode (no dropout); leaves the model, its gradients and the random stream as they were. Takes a copy of
    the model, twice as wide for float32, and dense ``length x length`` scores: mind the length of the inputs.

    Args:
        model: a model of a family with an adapter; may be patched (the copy compared with is not).
        inputs: keyword arguments of its forward, as a tokenizer returns them.
        backend: as for :func:`attnzoo.patch`.
        gradients: compare parameter gradients too.
        max_rows: query rows to judge per attention.
        seed: of the random cotangents.
        options: go to the backend.

    Returns:
        A :class:`Report`; ``.ok`` says whether everything is within its error budget.

    Raises:
        InvalidArgumentError: a bad argument, or the model returns nothing to compare.
        Whatever :func:`attnzoo.patch` or the model raises.
    """
    if not isinstance(model, nn.Module):
        raise InvalidArgumentError("model", type(model).__name__, "a torch.nn.Module")
    _check_rows(max_rows)
    if not isinstance(inputs, Mapping):
        raise InvalidArgumentError("inputs", type(inputs).__name__, "a mapping of keyword arguments of model.forward")
    inputs = dict(inputs)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    wide = dtype == torch.float64
    seen: dict[tuple[str, Request], tuple[Attention, str, Backend]] = {}
    rewriters: dict[str, tuple[Backend, list[object]]] = {}

    def observe(site: Site, attention: Attention, result: Result, ran: Backend) -> None:
        seen.setdefault((site.name, attention.request()), (attention, result.kernel, ran))
        if not ran.capabilities.exact:
            rewriters.setdefault(site.name, (ran, []))[1].append(ran.choices(attention))

    with torch.random.fork_rng(devices=_cuda_devices(model)), _eval_mode(model):
        with patch(model, backend, **options) as handle:
            for site in handle.sites:
                site.observer = observe
            found = [forward.found for forward in handle.forwards]
            fault = next((reason for one in found if (reason := one.seam.fault(one.module))), "")
            choosing = {one.name: (one.module, one.seam.replay) for one in found if one.seam.replay is not None}
            # Whose backward works in training only is compared end to end forward; its attentions, backward too.
            whole = gradients and not any(one.seam.backward_in_training for one in found)
            with recording(choosing) as choices:
                got = _run(model, inputs, whole, seed)
        unreached = [site.name for site in handle.sites if not site.calls]
        changed = "; ".join(dict.fromkeys(site.approximate for site in handle.sites if site.approximate))
        plain = copy.deepcopy(model)
        unpatch_all(plain)
        # There is no wider reference to see the roundings of a float64 model against: take those of float32 instead.
        narrow = copy.deepcopy(plain).float() if wide else plain
        narrow_inputs = _cast(inputs, torch.float32) if wide else inputs
        with replaying(narrow, choices):
            original = {} if fault or choices else _run(narrow, narrow_inputs, whole, seed)
        with replaying(narrow, choices), patch(narrow, oracles(rewriters)):
            eager = _run(narrow, narrow_inputs, whole, seed)
        double = _cast(inputs, torch.float64)
        if choices and not fault:
            # LSH models hide a token from itself with -1e5, which leaves float32 little of the score: judge in float64.
            with replaying(plain.double(), choices):
                original = _run(plain, double, whole, seed)
        with replaying(plain.double(), choices), patch(plain, oracles(rewriters)):
            reference = _run(plain, double, whole, seed)
        sites = tuple(
            check_site(name, attention, ran, grad=gradients, max_rows=max_rows, seed=seed, kernel=kernel)
            for (name, _), (attention, kernel, ran) in seen.items()
        )
    eager_dtype = torch.float32 if wide else None

    def compare(values: dict[str, Tensor], computed: torch.dtype) -> tuple[Check, ...]:
        return tuple(
            error_rule.check(
                what, values[what], reference[what], eager[what], error_rule.factor(what), computed, eager_dtype
            )
            for what in reference
            if what in values
        )

    name = str(dict(backend)) if isinstance(backend, Mapping) else str(backend)
    note, distance = "", {}
    if changed:
        distance = {
            what: float((original[what].double() - true).abs().max() / true.abs().max())
            for what, true in reference.items()
            if what in original and "gradient" not in what
        }
        original = {}
    if gradients and not whole:
        note = "gradients are compared per attention only: this model's backward works in training mode alone"
    if unreached:
        note = "; ".join(filter(None, (note, f"not said of what these inputs never reach: {', '.join(unreached)}")))
    own = compare(original, torch.float32 if wide else dtype)
    return Report(name, sites, compare(got, dtype), own, fault, note, changed, distance)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return {key: _cast(item, dtype) for key, item in value.items()} if isinstance(value, Mapping) else value


def _run(model: nn.Module, inputs: dict[str, Any], gradients: bool, seed: int) -> dict[str, Tensor]:
    """Outputs on real tokens by name, and the gradient of a random function of them.

    The gradient is one vector over all parameters that require grad: a single one may be zero but for rounding (a key
    projection's bias shifts every score of a row alike), and rounding has no budget of its own. To judge one parameter,
    freeze the others.
    """
    torch.manual_seed(seed)
    with torch.no_grad():  # as inference runs, which may go other ways than training
        found = _outputs(model, inputs)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not (gradients and parameters):
        return found
    torch.manual_seed(seed)
    with torch.enable_grad():
        outputs = _outputs(model, inputs)
    generator = torch.Generator().manual_seed(seed)
    total = sum(
        (output * torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)).sum()
        for output in outputs.values()
    )
    grads = torch.autograd.grad(total, parameters, allow_unused=True)  # type: ignore[arg-type]
    flat = [
        (torch.zeros_like(parameter) if grad is None else grad).flatten()
        for parameter, grad in zip(parameters, grads, strict=True)
    ]
    found["gradient of all parameters"] = torch.cat(flat)
    return found


def _outputs(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Every floating-point tensor the model returns by name; rows of padding tokens are left out."""
    returned = model(**inputs)
    items = returned.items() if isinstance(returned, Mapping) else [("output", returned)]
    found = {}
    for name, output in items:
        if isinstance(output, Tensor) and output.is_floating_point():
            real = _real_tokens(model, inputs, name, output)
            found[name] = output if real is None else output[real]
    if not found:
        raise InvalidArgumentError(
            "inputs", f"{sorted(inputs)}, for which the model returns no tensor", "a real forward"
        )
    return found


def _real_tokens(model: nn.Module, inputs: dict[str, Any], name: str, output: Tensor) -> Tensor | None:
    """Which rows ``(batch, length)`` of an output belong to real tokens; None if the inputs do not say.

    A decoder's rows count where its sample has a source to attend to.
    """
    mask = inputs.get("attention_mask")
    decodes = "decoder_input_ids" in inspect.signature(model.forward).parameters  # an encoder alone shares the config
    if decodes and not name.startswith("encoder"):
        sources = None if mask is None else mask.bool().flatten(1).any(1)
        mask = inputs.get("decoder_attention_mask")
        if mask is None and sources is not None and output.ndim > 1:
            mask = torch.ones(output.shape[:2], dtype=torch.bool, device=output.device)
        mask = mask if mask is None or sources is None else mask.bool() & sources[:, None]
    if not isinstance(mask, Tensor) or mask.ndim != 2 or output.shape[:2] != mask.shape:
        return None
    return mask.bool()
