"""Who runs in the shootout: the original model and every backend.

A contender says which cases it leaves out and why, and prepares an :class:`Entry` in a worker process. Whatever else
is to stand in the same table (another library's attention, say) is one more subclass of :class:`Contender`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

import attnzoo
from attnzoo.backend import Backend
from attnzoo.benchmarks.cases import DTYPES, Case, Subject, build
from attnzoo.benchmarks.measure import available_memory
from attnzoo.benchmarks.models import find_workload
from attnzoo.benchmarks.witness import false_claims, witness
from attnzoo.conformance.attention_check import AttentionReport, check_attention, worst
from attnzoo.conformance.error_rule import Check
from attnzoo.patching.patch import Handle
from attnzoo.patching.sites import Site
from attnzoo.registry import registry
from attnzoo.spec.segments import Attention, Result
from attnzoo.spelling import configured, parse
from attnzoo.tuning.race import GRIDS, GRIDS_KEPT


@dataclass(frozen=True)
class Gate:
    """The verdict on a contender's numbers.

    Attributes:
        ok: whether a speed may be shown.
        checks: every comparison with the float64 oracle under the error rule.
        complaint: why not, in words.
        error: error of the check that comes closest to its budget; None without checks.
        budget: the budget of that check.
        worst: what that check compared.
        recall: of a backend that changes the pattern: the share of full attention's weight that it still sees.
    """

    ok: bool
    checks: tuple[Check, ...] = ()
    complaint: str = ""
    error: float | None = None
    budget: float | None = None
    worst: str = ""
    recall: float | None = None


@dataclass(frozen=True)
class Executed:
    """What really ran in the measured runs.

    Attributes:
        kernel: the kernels, most frequent first.
        complaint: why this is not what was asked for; empty if it is.
    """

    kernel: str
    complaint: str = ""


class Entry:
    """A contender in its worker process. This base class is the original model: there is nothing to judge."""

    def __init__(self, subject: Subject, kernel: str) -> None:
        self.subject, self._kernel = subject, kernel

    def gate(self) -> Gate:
        """Judge correctness."""
        return Gate(True)

    def executed(self) -> Executed:
        """What ran so far."""
        return Executed(self._kernel)


@dataclass(frozen=True)
class Contender:
    """One row per cell.

    Attributes:
        name: what the row is called.
        peer: another library's attention: nothing judges its numbers, and it never counts as ours.
    """

    peer: ClassVar[bool] = False
    name: str

    def listed(self, case: Case) -> bool:
        """Whether the case has a row for this contender at all."""
        return True

    def obstacle(self, case: Case) -> str | None:
        """Why the case is not run, known without running it; None if it is."""
        return None

    def prepare(self, case: Case) -> Entry:
        """Build everything a run needs; called in a process of its own."""
        raise NotImplementedError


ORIGINAL = "native"
_SHORT = 1024


@dataclass(frozen=True)
class Original(Contender):
    """The model as transformers ships it: what every ratio refers to."""

    name: str = ORIGINAL

    def prepare(self, case: Case) -> Entry:
        """Build the model and leave it as it is."""
        subject = build(case)
        kernel = f"original ({subject.implementation()})"
        subject.release()
        return Entry(subject, kernel)


@dataclass(frozen=True)
class BackendContender(Contender):
    """A registered backend under :func:`attnzoo.patch`.

    Its name may have options, as one types them: ``blocked-local:window=1024``.

    Attributes:
        dense_limit: longest input of a backend that builds length x length scores; None: as memory allows.
    """

    dense_limit: int | None = None

    @property
    def backend(self) -> str:
        """The registered name."""
        return parse(self.name)[0]

    def obstacle(self, case: Case) -> str | None:
        """Not available here, or dense scores that take too long or do not fit."""
        info = attnzoo.backends()[self.backend]
        if not info.available:
            return info.reason
        if not registry.backend_class(self.backend).dense:
            return None
        if self.dense_limit is not None and case.seq_len > self.dense_limit:
            asked = f"--backend {self.backend} or --full runs it"
            return f"dense scores: left out beyond S={self.dense_limit} to save time; {asked}"
        needed, free = dense_bytes(case), available_memory(case.device)
        if free is not None and needed > free / 2:
            sizes = f"needs about {needed / 2**30:.1f} GiB, more than half of the free {free / 2**30:.1f} GiB"
            return f"dense scores: {sizes}"
        return None

    def prepare(self, case: Case) -> Entry:
        """Build the model and patch it."""
        if registry.backend_class(self.backend).compiles:
            self._compile(case)
        subject = build(case)
        return BackendEntry(subject, self.backend, subject.patch(self.name))

    def _compile(self, case: Case) -> None:
        """Run a short input: what is compiled serves every length, and compiling is not what is measured."""
        short = build(replace(case, seq_len=min(case.seq_len, _SHORT)))
        with short.patch(self.name):
            short.step()


def dense_bytes(case: Case) -> int:
    """Estimated peak memory of dense backends: what they keep of ``heads x S x S`` scores, per layer when training."""
    workload = find_workload(case.family)
    layers = workload.layers if case.train and case.scope == "model" else 1
    kept = GRIDS_KEPT * layers if case.train else 0
    scores = case.batch * workload.heads * case.seq_len**2 * DTYPES[case.dtype].itemsize
    return scores * (GRIDS + kept)


class BackendEntry(Entry):
    """A patched subject: judged per site by the one error rule, and asked what it executed."""

    def __init__(self, subject: Subject, backend: str, handle: Handle) -> None:
        super().__init__(subject, "")
        self._backend, self._handle = backend, handle
        self._judged: set[str] = set()

    def gate(self) -> Gate:
        """Compare the first site of each kind, on the inputs it really gets, with the float64 oracle."""
        seen: dict[tuple[Any, ...], tuple[str, Attention, Backend]] = {}
        strangers: set[str] = set()
        observed: Counter[tuple[str, str]] = Counter()
        counted = self._counted()

        def observe(site: Site, attention: Attention, result: Result, ran: Backend) -> None:
            if ran.name != self._backend:
                strangers.add(ran.name)
            observed[site.name, result.kernel] += 1
            seen.setdefault((site.cls, site.pattern, attention.request()), (site.name, attention, ran))

        with self._observed(observe), witness() as operators:
            self.subject.forward()
        lies = [f"reported {name}, which did not run" for name in false_claims((k for _, k in observed), operators)]
        lies += _miscounted(self._counted() - counted, observed)
        train = self.subject.case.train
        reports = tuple(check_attention(name, attention, ran, grad=train) for name, attention, ran in seen.values())
        self._judged = {report.kernel for report in reports}
        self.subject.clear()
        return judge(reports, strangers, self._backend, lies)

    def _counted(self) -> Counter[tuple[str, str]]:
        """Calls so far by site and kernel."""
        sites = self._handle.sites
        return Counter({(site.name, kernel): count for site in sites for kernel, count in site.kernels.items()})

    def _observed(self, observe: Callable[..., None]) -> _Observation:
        return _Observation(self._handle, observe)

    def executed(self) -> Executed:
        """The kernels of all sites; a complaint if any site did not run on the backend, or ran what was not judged."""
        counts: dict[str, int] = {}
        complaints = []
        for site in self._handle.sites:
            for kernel, count in site.kernels.items():
                counts[kernel] = counts.get(kernel, 0) + count
            ran = site.kernel
            if site.backend != self._backend or site.fallbacks or not site.calls or "native" in site.kernels:
                complaints.append(
                    f"{site.name}: asked for {self._backend!r}, got {site.backend!r} with kernel {ran} in {site.calls} "
                    f"calls and {site.fallbacks} fallbacks"
                )
        label = "+".join(sorted(counts, key=lambda kernel: -counts[kernel])) or "none"
        unjudged = sorted(set(counts) - self._judged)
        if unjudged:
            complaints.append(f"ran {', '.join(unjudged)}, which the gate did not judge")
        return Executed(label, "; ".join(complaints[:3]))


def _miscounted(counted: Counter[tuple[str, str]], observed: Counter[tuple[str, str]]) -> list[str]:
    """Sites that count other calls than were observed."""
    places = (place for place in counted | observed if counted[place] != observed[place])
    return [f"{site}: counted {counted[site, k]} calls of {k}, observed {observed[site, k]}" for site, k in places]


def judge(reports: tuple[AttentionReport, ...], strangers: set[str], backend: str, lies: Sequence[str] = ()) -> Gate:
    """The verdict on what the sites of a patched model did."""
    checks = tuple(check for report in reports for check in report.checks)
    if not checks:
        return Gate(False, complaint="no attention was observed")
    closest = worst(checks)
    complaint = ""
    if strangers:
        complaint = f"asked for {backend!r}, executed {', '.join(sorted(strangers))}"
    elif lies:
        complaint = "; ".join(lies[:3])
    elif not all(report.ok for report in reports):
        failed = [f"{report.name} {report.worst}" for report in reports if not report.ok]
        complaint = f"outside the error budget: {'; '.join(failed[:3])}"
    recalls = [report.recall for report in reports if report.recall is not None]
    recall = sum(recalls) / len(recalls) if recalls else None
    return Gate(not complaint, checks, complaint, closest.error, closest.budget, closest.what, recall)


class _Observation:
    """Sets the observer of every site of a handle for the time of a ``with`` block."""

    def __init__(self, handle: Handle, observe: Callable[..., None]) -> None:
        self._handle, self._observe = handle, observe

    def __enter__(self) -> None:
        for site in self._handle.sites:
            site.observer = self._observe

    def __exit__(self, *_: object) -> None:
        for site in self._handle.sites:
            site.observer = None


def end_to_end(family: str, backend: str, seq_len: int, dtype: str, device: str, gradients: bool) -> tuple[bool, str]:
    """:func:`attnzoo.verify` on a one-layer model of the family at published widths: verdict and report.

    The whole model is compared in float64 with dense scores, so the length is small.
    """
    workload = find_workload(family)
    model = workload.build(layers=1).to(device, DTYPES[dtype])
    kwargs = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in workload.read(1, seq_len).kwargs.items()
    }
    report = attnzoo.verify(model, kwargs, backend=configured(backend), gradients=gradients)
    return report.ok, str(report)
