"""The conformance kit: check that a backend computes all supported attentions correctly and refuses all others.

The kit runs one list of cases (:mod:`attnzoo.conformance.cases`) on every backend. If the backend returns no refusal
for a case, the results must agree with the float64 oracle under the error rule, forward and backward. If the backend
returns refusals, each must name a field, the value of the field and the allowed values, and the run must raise. If the
backend changes the pattern, the oracle computes the changed attention (:meth:`attnzoo.Backend.rewrite`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch

from attnzoo.backend import Backend
from attnzoo.backends.eager import evaluate
from attnzoo.conformance import error_rule
from attnzoo.conformance.attention_check import ALL_ROWS, check_attention
from attnzoo.conformance.cases import AttentionCase, RequestCase, cases
from attnzoo.conformance.dropout_check import dropout_failure
from attnzoo.conformance.error_rule import Check
from attnzoo.conformance.transform_check import check_transform
from attnzoo.conformance.unexercised import unexercised
from attnzoo.errors import AttnzooError, BackendRefusedError, InvalidArgumentError, Refusal
from attnzoo.functional import execute
from attnzoo.registry import registry
from attnzoo.spec.segments import FLOATS, Attention, Request

_EXPLAINED = {"empty": "empty (the output of queries that see no key)"}


class ConformanceError(AttnzooError, AssertionError):
    """Raised when a backend fails a case that the backend supports, or runs a case that the backend refuses."""


@dataclass(frozen=True)
class CaseOutcome:
    """The outcome of one case.

    Attributes:
        case: the case that was run or refused.
        refused: whether the backend returns refusals for the case.
        checks: comparisons of output and gradients with the oracle. Empty if the backend refused the case.
        failure: what is wrong, e.g. the failed checks. Empty if the case passed.
        request: the request of the case.
        empty: whether the attention has outputs for queries that see no key (:attr:`Attention.empty`).
    """

    case: AttentionCase | RequestCase
    refused: bool
    checks: tuple[Check, ...]
    failure: str
    request: Request
    empty: bool


@dataclass(frozen=True)
class ConformanceReport:
    """The outcomes of all cases for one backend. ``str()`` returns a summary.

    Attributes:
        backend: the name of the backend.
        outcomes: the outcomes in the order of the cases.
        unexercised: the declared properties that no case exercised, because the backend refused every case with the
            property. For example, ``"empty"`` if the backend supports no mask.
    """

    backend: str
    outcomes: tuple[CaseOutcome, ...]
    unexercised: tuple[str, ...] = ()

    @property
    def failures(self) -> tuple[CaseOutcome, ...]:
        """The outcomes with a failure."""
        return tuple(outcome for outcome in self.outcomes if outcome.failure)

    def __str__(self) -> str:
        refused = sum(outcome.refused for outcome in self.outcomes)
        ran = len(self.outcomes) - refused
        lines = [f"{self.backend}: {ran} cases ran, {refused} were refused, {len(self.failures)} failed"]
        if ran and self.unexercised:
            names = (_EXPLAINED.get(name, name) for name in self.unexercised)
            lines.append(f"  not exercised by the cases that ran: {', '.join(names)}")
        lines += [f"  {outcome.case}: {outcome.failure}" for outcome in self.failures]
        return "\n".join(lines)


def check_backend(
    backend: str | Backend, *, device: str = "cpu", dtypes: tuple[torch.dtype, ...] = FLOATS, seed: int = 0
) -> ConformanceReport:
    """Run every case of the kit on a backend and return the outcomes, or raise if a case fails.

    Args:
        backend: a registered name, or a configured backend.
        device: the device type of the tensors, e.g. ``"cuda"``.
        dtypes: the dtypes of the cases. Other dtypes are not checked.
        seed: seed of the random tensors.

    Raises:
        InvalidArgumentError: ``backend`` is neither a name nor a backend.
        UnknownNameError: no backend of that name is registered.
        BackendRefusedError: the backend is not available on this machine.
        ConformanceError: a case failed, or the backend refuses all cases. The message lists all failures.

    Example:
        >>> import torch, attnzoo
        >>> attnzoo.testing.check_backend("eager", dtypes=(torch.float16,)).failures
        ()
    """
    configured = registry.make_backend(backend) if isinstance(backend, str) else backend
    if not isinstance(configured, Backend):
        raise InvalidArgumentError("backend", repr(configured), "a registered name, or a backend object")
    outcomes = tuple(run_case(configured, case, device, seed) for case in cases(dtypes))
    ran = [outcome for outcome in outcomes if not outcome.refused]
    properties = unexercised(configured.capabilities, *([o.request for o in some] for some in (outcomes, ran)))
    if any(outcome.empty for outcome in outcomes) and not any(outcome.empty for outcome in ran):
        properties += ("empty",)
    report = ConformanceReport(configured.name, outcomes, properties)
    if report.failures:
        raise ConformanceError(str(report))
    if all(outcome.refused for outcome in outcomes):
        raise ConformanceError(
            f"{report}: the backend refuses all cases on {device!r}; use another device or other dtypes"
        )
    return report


def run_case(backend: Backend, case: AttentionCase | RequestCase, device: str = "cpu", seed: int = 0) -> CaseOutcome:
    """Run one case on a backend and return the outcome. If the backend refuses the case, check the refusals."""
    attention = case.attention(device, seed)
    transforms = tuple(case.transform.split(" of ")) if case.transform else ()
    request = replace(attention.request(case.probabilities), transforms=transforms)
    outcome = partial(CaseOutcome, case=case, request=request, empty=attention.empty is not None)
    refusals = registry.refusals(backend, request)
    if refusals:
        failure = _refusal_failure(backend, case, attention, refusals)
        return outcome(refused=True, checks=(), failure=failure)
    failure, hint, checks = "", "", tuple[Check, ...]()
    try:
        if case.transform:
            checks = (check_transform(attention, backend, case.transform),)
        elif attention.dropout:
            failure = dropout_failure(backend, attention, case.probabilities, seed)
        else:
            grad = attention.request().grad
            checks = check_attention("case", attention, backend, grad=grad, max_rows=ALL_ROWS, seed=seed).checks
            failure = _result_failure(backend, case, attention)
        failure = _failed(checks) or failure
        hint = _padding_hint(backend, attention) if failure else ""
    except Exception as error:  # a backend may raise anything; every exception is a failure of the case
        raised = f"the backend supports this case, but raised {type(error).__name__}: {error}"
        failure = _failed(checks) or failure or raised
    return outcome(refused=False, checks=checks, failure=failure + hint)


def _padding_hint(backend: Backend, attention: Attention) -> str:
    """Return how to mend rows of padding queries that are not zero, or an empty string if these rows are zero."""
    if attention.query_mask is None:
        return ""
    output = execute(backend, attention).output.detach()
    if output.shape[:3] != attention.query.shape[:3]:
        return ""
    rows = output.transpose(1, 2)[~attention.query_mask]
    return "; rows of padding queries must be zero: use Attention.fill" if bool((rows != 0).any()) else ""


def _failed(checks: Iterable[Check]) -> str:
    return "; ".join(str(check) for check in checks if not check.ok)


def _refusal_failure(
    backend: Backend, case: AttentionCase | RequestCase, attention: Attention, refusals: tuple[Refusal, ...]
) -> str:
    """Return what is wrong if the backend runs the refused case or returns vague refusals, or an empty string."""
    try:
        if case.transform:
            check_transform(attention, backend, case.transform)
        else:
            execute(backend, attention, case.probabilities)
    except BackendRefusedError:
        vague = [refusal for refusal in refusals if not (refusal.field and refusal.got and refusal.allowed)]
        return f"these refusals have an empty field, got or allowed: {vague}" if vague else ""
    except Exception as error:
        return (
            f"the backend refuses this case, but raised {type(error).__name__}: {error}; allowed: BackendRefusedError"
        )
    return f"the backend refuses this case, but ran it; the refusals: {'; '.join(map(str, refusals))}"


def _result_failure(backend: Backend, case: AttentionCase | RequestCase, attention: Attention) -> str:
    """Return what is wrong with shape, dtype, kernel name or probabilities of the result, or an empty string."""
    result, dtype = execute(backend, attention, case.probabilities), attention.query.dtype
    expected = (attention.batch, attention.heads, attention.q_len, attention.value_dim)
    if tuple(result.output.shape) != expected or result.output.dtype != dtype:
        return f"output: got shape {tuple(result.output.shape)}, {result.output.dtype}; allowed: {expected}, {dtype}"
    if not isinstance(result.kernel, str) or not result.kernel:
        return f"kernel of the result: got {result.kernel!r}; allowed: a non-empty string"
    if not case.probabilities:
        return ""
    reference = evaluate(attention.with_tensors(tuple(t.detach().double() for t in attention.tensors())))
    plain_dtype = error_rule.plain_dtype(dtype)
    eager = evaluate(attention.with_tensors(tuple(t.detach().to(plain_dtype) for t in attention.tensors())))
    checks: list[Check] = []
    for what in ("probabilities", "dropped"):  # without dropout, both are the softmax weights
        got, exact, plain = (getattr(source, what) for source in (result, reference, eager))
        if got is None or len(got) != len(attention.segments):
            return f"the backend supports probabilities, but did not return one tensor per segment in {what!r}"
        triples = zip(got, exact, plain, strict=True)
        checks += [error_rule.check(what, *triple, error_rule.FORWARD, dtype, plain_dtype) for triple in triples]
    return _failed(checks)
