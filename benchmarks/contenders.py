"""The contenders of a shootout: the original model and the backends. ``peers.py`` has the other libraries (peers)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import attnzoo
from attnzoo.backend import Backend
from attnzoo.benchmarks.cases import AUTO, DTYPES, Case, Subject, build
from attnzoo.benchmarks.measure import available_memory
from attnzoo.benchmarks.models import find_workload
from attnzoo.benchmarks.rows import ORIGINAL, REFUSED, SKIPPED, Problem
from attnzoo.benchmarks.witness import PLAIN, misreports, witness
from attnzoo.conformance.attention_check import AttentionReport, check_attention, worst
from attnzoo.conformance.error_rule import Check
from attnzoo.patching.patch import Handle
from attnzoo.patching.sites import Site
from attnzoo.registry import registry
from attnzoo.spec.segments import Attention, Result
from attnzoo.spelling import parse
from attnzoo.tuning.race import GRIDS, GRIDS_KEPT

# Maximum input length in tokens for the run that compiles a backend before the measured runs.
_COMPILE_LEN = 1024
# Number of query rows that the gate compares in the first attention of each kind, and in every other attention.
_GATE_ROWS, _CALL_ROWS = 128, 16


@dataclass(frozen=True)
class GateVerdict:
    """The verdict of the correctness gate on a contender.

    Attributes:
        complaint: reason why the row must not show a speed. Empty if the contender passes.
        checks: number of comparisons with the float64 oracle under the error rule.
        closest: the comparison in which the error is the largest fraction of the error budget.
        recall: as in :class:`~attnzoo.benchmarks.rows.Row`.
    """

    complaint: str = ""
    checks: int = 0
    closest: Check | None = None
    recall: float | None = None


class Execution(NamedTuple):
    """The kernels that ran, and whether the row may show a speed.

    Attributes:
        kernel: names of the kernels that ran, most frequent first.
        complaint: reason why the row must not show a speed. Empty if the requested kernels ran and results are right.
        sites: number of attention modules that every step of a call ran.
    """

    kernel: str
    complaint: str = ""
    sites: int = 0


class PreparedContender:
    """A contender that is ready to run. This base class serves the original model and peers, and checks nothing."""

    def __init__(self, subject: Subject, kernel: str = "") -> None:
        self.subject, self._kernel = subject, kernel

    def gate(self) -> GateVerdict:
        return GateVerdict()

    def execution(self) -> Execution:
        return Execution(self._kernel)


@dataclass(frozen=True)
class Contender:
    """Code that a case measures. ``Row.backend`` stores :attr:`name`, and ``Row.peer`` stores :attr:`peer`."""

    peer: ClassVar[bool] = False
    name: str

    def has_row(self, case: Case) -> bool:
        """Whether the results of the case include a row for this contender."""
        return True

    def check(self, case: Case) -> None:
        """Raise :class:`Problem` if the contender cannot run the case. The check runs no model and no backend."""

    def prepare(self, case: Case) -> PreparedContender:
        """Build the subject and return the contender ready to run. The worker process calls this method."""
        raise NotImplementedError


@dataclass(frozen=True)
class Original(Contender):
    """The unpatched model of transformers. ``Row.speedup`` and ``Row.peak_ratio`` are relative to this model."""

    name: str = ORIGINAL

    def prepare(self, case: Case) -> PreparedContender:
        subject = build(case)
        kernel = f"original ({getattr(subject.model.config, '_attn_implementation', None)})"
        subject.release()
        return PreparedContender(subject, kernel)


@dataclass(frozen=True)
class BackendContender(Contender):
    """A registered backend or ``auto``, in a subject that :meth:`Subject.patch` patches with this backend.

    :attr:`name` may include options, as on the command line: ``blocked-local:window=1024``. If the backend stores all
    ``length x length`` scores, inputs longer than :attr:`dense_limit` tokens are skipped. None means no such limit.
    """

    dense_limit: int | None = None

    @property
    def backend(self) -> str:
        return AUTO if self.name == AUTO else parse(self.name)[0]

    def unavailable(self) -> str | None:
        """Return why the backend cannot run on this machine, or None."""
        info = attnzoo.backends().get(self.backend)  # ``auto`` is not listed, because some backend is always available
        return None if info is None or info.available else str(info.reason)

    def check(self, case: Case) -> None:
        reason = self.unavailable()
        if reason is not None:
            raise Problem(REFUSED, reason)
        if self.backend == AUTO or not registry.backend_class(self.backend).dense:
            return
        limit = self.dense_limit
        if limit is not None and case.seq_len > limit:
            remedy = f"--backend {self.backend} or --full runs this case"
            raise Problem(SKIPPED, f"dense scores: skipped above S={limit} to save time; {remedy}")
        needed, free = dense_bytes(case), available_memory(case.device)
        if free is not None and needed > free / 2:
            sizes = f"{needed / 2**30:.1f} GiB, more than half of the free {free / 2**30:.1f} GiB"
            raise Problem(SKIPPED, f"dense scores need about {sizes}")

    def prepare(self, case: Case) -> PreparedContender:
        # ``auto`` may select a backend that compiles, but only if ``tune`` has measured this backend.
        if self.backend == AUTO or registry.backend_class(self.backend).compiles:
            # Compile with a short input now, so that compile time is not measured. The compiled code runs every length.
            short = build(replace(case, seq_len=min(case.seq_len, _COMPILE_LEN)))
            with short.patch(self.name):
                short.step()
        subject = build(case)
        return PreparedBackend(subject, self.backend, subject.patch(self.name))


def dense_bytes(case: Case) -> int:
    """Estimate the bytes of the ``heads x S x S`` scores: of one layer in a forward, of all layers in training."""
    workload = find_workload(case.family)
    layers = workload.layers if case.scope == "model" else 1
    grids = GRIDS + (GRIDS_KEPT * layers if case.train else 0)
    return grids * case.batch * workload.heads * case.seq_len**2 * DTYPES[case.dtype].itemsize


class PreparedBackend(PreparedContender):
    """A patched subject. The gate checks the error of every attention, and whether the requested backend ran.

    With ``auto``, modules may run the model's code. These runs are counted, but there is no attention to check.
    """

    def __init__(self, subject: Subject, backend: str, handle: Handle) -> None:
        super().__init__(subject)
        self._backend, self._handle = backend, handle
        self._checked_kernels: set[str] = {ORIGINAL} if backend == AUTO else set()

    def gate(self) -> GateVerdict:
        """Compare all attentions of one forward with the float64 oracle, and return the verdict.

        First, some rows of every result are compared. Then one attention of each kind of site runs again. For this
        attention, more rows are compared and, in training, also the gradients.
        """
        return self._judge(_GATE_ROWS)

    def _judge(self, max_rows: int) -> GateVerdict:
        kinds: dict[tuple[Any, ...], tuple[str, Attention, Backend]] = {}
        calls: list[AttentionReport] = []
        others: set[str] = set()
        observed: Counter[tuple[str, str]] = Counter()
        before = kernel_counts(self._handle)

        def observe(site: Site, attention: Attention, result: Result, ran: Backend) -> None:
            if self._backend not in (ran.name, AUTO):
                others.add(ran.name)
            observed[site.name, result.kernel] += 1
            kinds.setdefault((site.cls, site.pattern, attention.request()), (site.name, attention, ran))
            calls.append(check_attention(site.name, attention, ran, grad=False, max_rows=_CALL_ROWS, result=result))

        for site in self._handle.sites:
            site.observer = observe
        with witness() as operators:
            self.subject.forward()
        for site in self._handle.sites:
            site.observer = None
        reported: Counter[str] = Counter()
        for (_, kernel), count in observed.items():
            reported[kernel] += count
        counted = kernel_counts(self._handle) - before
        if self._backend == AUTO:
            native = [place for place in counted if place[1] == ORIGINAL]
            for place in native:
                del counted[place]
            if native:
                # The model's code runs kernels of SDPA, too, so their presence does not contradict plain operations.
                del reported[PLAIN]
            if not observed and native:
                return GateVerdict()
        wrong = [*misreports(reported, operators), *_miscounts(counted, observed)]
        train = self.subject.case.train
        reports = [
            check_attention(name, attention, ran, grad=train, max_rows=max_rows)
            for name, attention, ran in kinds.values()
        ]
        self._checked_kernels |= {report.kernel for report in reports}
        self.subject.clear()
        return _verdict([*calls, *reports], others, self._backend, wrong)

    def execution(self) -> Execution:
        """Return the kernels of all sites. Call this after the timed runs, because it also checks one more forward.

        The result has a complaint if a kernel ran that the gate did not check, if another backend ran, or if the
        results of the additional forward are wrong.
        """
        counts: Counter[str] = Counter()
        complaints = []
        for site in self._handle.sites:
            counts.update(site.kernels)
            native = ORIGINAL in site.kernels and self._backend != AUTO
            if site.backend != self._backend or site.fallbacks or not site.calls or native:
                ran = f"ran {site.backend!r} with kernel {site.kernel}"
                counted = f"{site.calls} calls, {site.fallbacks} fallbacks"
                complaints.append(f"{site.name}: requested {self._backend!r}, {ran} ({counted})")
        unchecked = sorted(set(counts) - self._checked_kernels)
        if unchecked:
            complaints.append(f"ran {', '.join(unchecked)}, which the gate did not check")
        kernel = "+".join(kernel for kernel, _ in counts.most_common()) or "none"
        if complaints:
            return Execution(kernel, f"not what was requested: {'; '.join(complaints[:3])}")
        before = kernel_counts(self._handle)
        complaint = self._judge(_CALL_ROWS).complaint
        sites = sites_in_every_step(self.subject, kernel_counts(self._handle) - before)
        return Execution(kernel, f"after the timed runs: {complaint}" if complaint else "", sites)


def kernel_counts(handle: Handle) -> Counter[tuple[str, str]]:
    """Return the number of runs so far for each ``(name of the site, kernel)``."""
    return Counter({(site.name, kernel): count for site in handle.sites for kernel, count in site.kernels.items()})


def sites_in_every_step(subject: Subject, ran: Counter[tuple[str, str]]) -> int:
    """Return the number of sites that ran at least once per step of a call. ``ran`` are the runs of this call."""
    of_site: Counter[str] = Counter()
    for (name, _), count in ran.items():
        of_site[name] += count
    return sum(count >= subject.tokens for count in of_site.values())


def _miscounts(counted: Counter[tuple[str, str]], observed: Counter[tuple[str, str]]) -> list[str]:
    """Compare the calls that the sites counted with the calls that the gate observed. Return a line per difference."""
    wrong = (place for place in counted | observed if counted[place] != observed[place])
    return [f"{site}: counted {counted[site, k]} calls of {k}, observed {observed[site, k]}" for site, k in wrong]


def _verdict(reports: Sequence[AttentionReport], others: set[str], backend: str, wrong: list[str]) -> GateVerdict:
    checks = [check for report in reports for check in report.checks]
    failed = list(dict.fromkeys(f"{report.name} {report.worst}" for report in reports if not report.ok))
    recalls = [report.recall for report in reports if report.recall is not None]
    complaint = ""
    if not checks:
        return GateVerdict("no attention ran")
    if others:
        complaint = f"requested {backend!r}, but {', '.join(sorted(others))} ran"
    elif wrong:
        complaint = "; ".join(wrong[:3])
    elif failed:
        complaint = f"outside the error budget: {'; '.join(failed[:3])}"
    return GateVerdict(complaint, len(checks), worst(checks), sum(recalls) / len(recalls) if recalls else None)
