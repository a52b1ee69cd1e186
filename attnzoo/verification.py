"""Proving that a patch changes nothing but speed and memory, on the user's own model and inputs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo import error_rule
from attnzoo.backend import Backend
from attnzoo.error_rule import Check
from attnzoo.errors import InvalidArgumentError
from attnzoo.oracles import oracles
from attnzoo.patching import patch, unpatch_all
from attnzoo.replay import own_random_stream, recording, replaying
from attnzoo.reports import Report, SiteReport, worst
from attnzoo.segments import Attention, Request, Result
from attnzoo.site_check import check_rows, check_site
from attnzoo.sites import Site

__all__ = ["Report", "SiteReport", "check_site", "verify", "worst"]


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
    check_rows(max_rows)
    if not isinstance(inputs, Mapping):
        raise InvalidArgumentError("inputs", type(inputs).__name__, "a mapping of keyword arguments of model.forward")
    if gradients and torch.is_inference_mode_enabled():
        raise InvalidArgumentError("gradients", "True inside torch.inference_mode()", "False, or outside of it")
    inputs = dict(inputs)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    wide = dtype == torch.float64
    seen: dict[tuple[str, Request], tuple[Attention, str, Backend]] = {}
    rewriters: dict[str, tuple[Backend, list[object]]] = {}

    def observe(site: Site, attention: Attention, result: Result, ran: Backend) -> None:
        seen.setdefault((site.name, attention.request()), (attention, result.kernel, ran))
        if not ran.capabilities.exact:
            rewriters.setdefault(site.name, (ran, []))[1].append(ran.choices(attention))

    with own_random_stream(model), _eval_mode(model):
        with patch(model, backend, **options) as handle:
            for site in handle.sites:
                site.observer = observe
            found = [forward.of(module) for forward in handle.forwards if (module := forward.module) is not None]
            fault = next((reason for one in found if (reason := one.seam.fault(one.module))), "")
            choosing = {one.name: (one.module, one.seam.replay) for one in found if one.seam.replay is not None}
            # Whose backward works in training only is compared end to end forward; its attentions, backward too.
            whole = gradients and not any(one.seam.backward_in_training for one in found)
            if whole and any(p.is_meta and p.requires_grad for p in model.parameters()):
                raise InvalidArgumentError("gradients", "True for offloaded weights, which have none", "False")
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
            (
                output * torch.randn(output.shape, generator=generator, dtype=torch.float64, device="cpu").to(output)
            ).sum()
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
