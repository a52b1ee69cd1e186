"""Run a shootout: first the end-to-end gates, then for each case the peak memory, the gates and the times."""

from __future__ import annotations

import datetime
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

from attnzoo.benchmarks.cases import AUTO, DTYPES, HOST_SCOPES, SCOPES, Case
from attnzoo.benchmarks.contenders import BackendContender, Contender, Original
from attnzoo.benchmarks.counting import Counting
from attnzoo.benchmarks.kernel_peers import KERNEL_PEERS
from attnzoo.benchmarks.measure import CLOCKS, machine
from attnzoo.benchmarks.models import find_workload
from attnzoo.benchmarks.peers import SCOPE as PEER_SCOPE
from attnzoo.benchmarks.peers import peers_of
from attnzoo.benchmarks.rows import OK, ORIGINAL, RED, REFUSED, SKIPPED, EndToEnd, Problem, Row, Shootout
from attnzoo.benchmarks.text import require_tokens
from attnzoo.benchmarks.worker import EndToEndJob, ProcessWorker, Worker, as_problem, process_context, verify_in_process
from attnzoo.errors import InvalidArgumentError, UnknownNameError
from attnzoo.registry import registry
from attnzoo.spelling import parse, spell

Launch = Callable[[Contender, Case], Worker]
EndToEndCheck = Callable[[EndToEndJob], tuple[bool, str]]
Progress = Callable[[float, str], None]

MIN_ROUNDS, MAX_ROUNDS = 3, 9
# Share of the progress bar for the end-to-end gates.
_GATES_SHARE = 0.1


@dataclass(frozen=True)
class ShootoutPlan:
    """The options of a shootout. Result files store these fields.

    Attributes:
        families, seq_lens: values of :attr:`Case.family` and :attr:`Case.seq_len`. Every combination is run.
        scope, dtype, device, threads, batch, layers, clock: as in :class:`~attnzoo.benchmarks.cases.Case`.
        backends: names or aliases, with options as in ``lsh:num_hashes=2,...``, or ``"auto"``. None means every exact
            backend.
        modes: ``False`` (forward), ``True`` (forward+backward), or both.
        original: whether the original model runs. Without the original model, rows have no ratios.
        rounds: number of timed runs per row. None means from 3 to 9 runs, depending on :attr:`seconds_per_case`.
        seconds_per_case: time budget for the timed runs of a case if ``rounds`` is None.
        dense_limit: longest input of dense backends in tokens. None means that only the memory limits the input.
        train_limit: longest input for forward+backward in tokens. None means no limit.
        verify_len: input length of the end-to-end gate in tokens. None means that no end-to-end gate runs.
        peers: whether peers run. True requires the scope ``attention``. None means True if the scope is ``attention``.
    """

    families: tuple[str, ...] = ("led",)
    seq_lens: tuple[int, ...] = (1024, 2048, 4096)
    backends: tuple[str, ...] | None = None
    scope: str = "model"
    modes: tuple[bool, ...] = (False, True)
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    batch: int = 1
    original: bool = True
    layers: int | None = None
    clock: str = "wall"
    rounds: int | None = None
    seconds_per_case: float = 10.0
    dense_limit: int | None = 1024
    train_limit: int | None = None
    verify_len: int | None = 1024
    peers: bool | None = None

    def __post_init__(self) -> None:
        for family in self.families:
            find_workload(family)
        choices = {"scope": SCOPES, "dtype": DTYPES, "device": ("cpu", "cuda"), "clock": CLOCKS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UnknownNameError(name, getattr(self, name), allowed)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InvalidArgumentError("device", "'cuda'", f"'cpu', as torch {torch.__version__} finds no CUDA device")
        if self.clock == "cpu" and self.device == "cuda":
            raise InvalidArgumentError(
                "clock", "'cpu' with device 'cuda'", "'wall', which includes the time of the GPU"
            )
        if self.layers is not None and self.scope not in ("model", "decode"):
            raise InvalidArgumentError("layers", f"--layers with scope {self.scope!r}", "--scope model or decode")
        if True in self.modes and self.scope in HOST_SCOPES:
            raise InvalidArgumentError("train", f"--train with scope {self.scope!r}", "--no-train")
        if self.peers and self.scope != PEER_SCOPE:
            raise InvalidArgumentError("peers", f"--peers with scope {self.scope!r}", f"--scope {PEER_SCOPE}")
        if not self.families or not self.seq_lens or not self.modes:
            raise InvalidArgumentError("plan", "no model, no length or no mode", "at least one of each")
        counts = [("threads", self.threads), ("batch", self.batch), ("rounds", self.rounds), ("layers", self.layers)]
        for name, count in [*(("seq-len", seq_len) for seq_len in self.seq_lens), *counts]:
            if count is not None and count < 1:
                raise InvalidArgumentError(name, count, "an integer >= 1")
        require_tokens(self.batch * max(self.seq_lens))

    def contenders(self) -> tuple[Contender, ...]:
        """Return the original, the backends and the peers, in this order. Aliases are replaced by registered names.

        If the scope measures the host time, the patch ``native`` stands between the original and the backends.
        """
        limit = self.dense_limit
        if self.backends is None:
            names = [info.name for info in registry.backends().values() if info.exact or not info.available]
        else:
            names = list(dict.fromkeys(_spelled(name) for name in self.backends if name != ORIGINAL))
            limit = None
        peers: tuple[Contender, ...] = ()
        if self.scope == PEER_SCOPE and self.peers is not False:
            peers = (*peers_of(self.families), *(KERNEL_PEERS if self.device == "cuda" else ()))
        originals: tuple[Contender, ...] = (Original(),) if self.original else ()
        originals += (Counting(),) if self.scope in HOST_SCOPES else ()
        return (*originals, *(BackendContender(name, limit) for name in names), *peers)

    def cases(self) -> Iterator[Case]:
        setting = (self.batch, self.dtype, self.device, self.threads)
        for family, seq_len, train in itertools.product(self.families, self.seq_lens, self.modes):
            yield Case(family, self.scope, seq_len, *setting, train, self.layers, self.clock)


def _spelled(backend: str) -> str:
    """Return a backend and its options, without aliases. Raise for a wrong option before the measurements start."""
    if backend == AUTO:
        return AUTO
    name, options = parse(backend)
    registry.configure(name, **options)
    return spell(name, options)


def run(
    plan: ShootoutPlan,
    progress: Progress = lambda done, text: None,
    launch: Launch | None = None,
    check: EndToEndCheck | None = None,
    contenders: tuple[Contender, ...] | None = None,
    keep: Callable[[Shootout], None] = lambda so_far: None,
) -> Shootout:
    """Run a shootout, and return the results, including refused and skipped rows.

    ``launch`` starts a worker, and ``check`` runs an end-to-end gate. The defaults use a fresh process for each call.
    ``progress`` is called with the completed share of the work (0 to 1) and the name of the next step. ``keep`` is
    called after each case with the results so far.
    """
    started, created = time.perf_counter(), datetime.datetime.now(datetime.timezone.utc)
    if contenders is None:
        contenders = plan.contenders()
    if launch is None or check is None:
        context = process_context(find_workload(family).model_class.partition(":")[0] for family in plan.families)
        launch = launch or partial(ProcessWorker, context)
        check = check or partial(verify_in_process, context)
    versions, fields = machine(plan.device), json.loads(json.dumps(asdict(plan)))
    verdicts = _end_to_end(plan, contenders, check, partial(_progress_within, progress, 0.0, _GATES_SHARE))
    rows: list[Row] = []
    costs = {case: case.seq_len * (3 if case.train else 1) for case in plan.cases()}
    done = _GATES_SHARE
    for case, cost in costs.items():
        share = (1 - _GATES_SHARE) * cost / sum(costs.values())
        case_progress = partial(_progress_within, progress, done, share)
        rows += _CaseRun(plan, case, versions, verdicts, launch, case_progress).run(contenders)
        done += share
        seconds, when = time.perf_counter() - started, created.isoformat(timespec="seconds")
        result = Shootout(fields, versions, tuple(verdicts), tuple(rows), when, seconds)
        keep(result)
    return result


def _progress_within(progress: Progress, start: float, share: float, done: float, text: str) -> None:
    progress(start + share * done, text)


def _end_to_end(
    plan: ShootoutPlan, contenders: Iterable[Contender], check: EndToEndCheck, progress: Progress
) -> list[EndToEnd]:
    verdicts: list[EndToEnd] = []
    if plan.verify_len is None:
        return verdicts
    backends = [contender for contender in contenders if isinstance(contender, BackendContender)]
    names = [contender.name for contender in backends if contender.unavailable() is None]
    pairs = [(family, name) for family in plan.families for name in names]
    for number, (family, name) in enumerate(pairs):
        progress(number / len(pairs), f"{family}: {name}, whole model against float64")
        for gradients in sorted(set(plan.modes), reverse=True):
            job = EndToEndJob(family, name, plan.verify_len, plan.dtype, plan.device, plan.threads, gradients)
            try:
                ok, report = check(job)
                status = OK if ok else RED
            except Exception as error:
                problem = as_problem(error)
                status, report = problem.status, problem.reason
            verdicts.append(EndToEnd(family, name, plan.verify_len, status, report, gradients))
            if status != REFUSED:
                break  # the check with gradients also compared the outputs
    return verdicts


class _CaseRun:
    """The measurements of all contenders of one case."""

    def __init__(
        self, plan: ShootoutPlan, case: Case, versions: dict[str, str], verdicts: Sequence[EndToEnd], launch: Launch,
        progress: Progress,
    ) -> None:  # fmt: skip
        self._plan, self._case, self._versions, self._verdicts = plan, case, versions, verdicts
        self._launch, self._progress = launch, progress
        self._workers: dict[str, Worker] = {}
        self._rows: dict[str, Row] = {}
        self._first_seconds: dict[str, float] = {}
        self._done = 0.0

    def run(self, contenders: tuple[Contender, ...]) -> list[Row]:
        """Return the rows in the order of the contenders."""
        participants = [contender for contender in contenders if contender.has_row(self._case)]
        try:
            for number, contender in enumerate(participants):
                self._done = 0.5 * number / len(participants)
                self._rows[contender.name] = self._empty_row(contender)
                with self._problems_of(contender.name):
                    self._check_exclusions(contender)
                    self._measure_memory_and_gate(contender)
            self._time()
            for name in list(self._workers):
                with self._problems_of(name):
                    self._check_execution(name)
        finally:
            for worker in self._workers.values():
                worker.close()
        return [row.compared_with(self._rows.get(ORIGINAL)) for row in self._rows.values()]

    @contextmanager
    def _problems_of(self, name: str) -> Iterator[None]:
        """Context manager that stores an exception as the status of row ``name``, and ends the row's worker."""
        try:
            yield
        except Exception as error:
            problem = as_problem(error)
            self._rows[name] = self._rows[name].without_measurements(problem.status, problem.reason)
            if name in self._workers:
                self._workers.pop(name).close()

    def _empty_row(self, contender: Contender) -> Row:
        case = self._case
        workload = find_workload(case.family)
        notes = []
        if too_long := workload.too_long(case.seq_len):
            notes.append(f"{too_long}; here there are {case.seq_len}")
        if case.layers is not None:
            notes.append(f"{case.layers} layer(s) in each stack, fewer than published")
        if case.clock == "cpu":
            notes.append("times are CPU time")
        return Row(
            case.family, workload.checkpoint, case.scope, contender.name, case.seq_len, case.batch, case.dtype,
            case.device, case.threads, case.mode, self._versions, peer=contender.peer, note="; ".join(notes),
        )  # fmt: skip

    def _report(self, name: str, step: str) -> None:
        self._progress(self._done, f"{self._case.family} S={self._case.seq_len} {self._case.mode}: {name}, {step}")

    def _check_exclusions(self, contender: Contender) -> None:
        """Raise :class:`Problem` if the contender cannot run the case.

        Also raise if the case is larger than the benchmark plan allows, or if the contender failed an earlier check.
        """
        case, limit = self._case, self._plan.train_limit
        if case.train and case.scope == "model":
            try:
                find_workload(case.family).check_training(case.seq_len)
            except InvalidArgumentError as error:
                raise Problem(SKIPPED, str(error)) from error
        if case.train and limit is not None and case.seq_len > limit:
            remedy = "--full, --train or --seq-len runs this case"
            raise Problem(SKIPPED, f"forward+backward: skipped above S={limit} to save time; {remedy}")
        contender.check(case)
        for verdict in self._verdicts:
            if (verdict.family, verdict.backend) == (case.family, contender.name) and verdict.blocks(case.train):
                raise Problem(verdict.status, f"whole model, end to end: {verdict.report}")

    def _measure_memory_and_gate(self, contender: Contender) -> None:
        name = contender.name
        self._report(name, "first run, memory")
        worker = self._workers[name] = self._launch(contender, self._case)
        peak, self._first_seconds[name] = worker.setup()
        self._report(name, "gate")
        gate = worker.gate()
        row = replace(self._rows[name], peak_bytes=peak.extra, before_bytes=peak.before, memory_method=peak.method)
        if closest := gate.closest:
            row = replace(row, error=closest.error, budget=closest.budget, worst=closest.what)
        self._rows[name] = replace(row, checks=gate.checks, recall=gate.recall)
        if gate.complaint:
            raise Problem(RED, gate.complaint)

    def _time(self) -> None:
        """Time the contenders in turn. Each round starts with another contender, so that noise affects all equally."""
        expected = sum(self._first_seconds[name] for name in self._workers)
        affordable = int(self._plan.seconds_per_case / max(expected, 1e-3))
        rounds = self._plan.rounds or max(MIN_ROUNDS, min(MAX_ROUNDS, affordable))
        times: dict[str, list[float]] = {name: [] for name in self._workers}
        for number in range(rounds):
            names = list(self._workers)
            first = number % max(1, len(names))
            self._done = 0.5 + 0.5 * number / rounds
            for name in names[first:] + names[:first]:
                self._report(name, f"round {number + 1} of {rounds}")
                with self._problems_of(name):
                    times[name].append(self._workers[name].time())
        for name in self._workers:
            self._rows[name] = self._rows[name].with_times(tuple(times[name]))

    def _check_execution(self, name: str) -> None:
        execution = self._workers[name].execution()
        sites = execution.sites if self._case.scope in HOST_SCOPES else None
        self._rows[name] = replace(self._rows[name], kernel=execution.kernel, sites=sites)
        if execution.complaint:
            raise Problem(RED, execution.complaint)
